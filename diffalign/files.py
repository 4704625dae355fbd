"""Files that are whole or absent; text, JSON and lists of JSON objects, one a line.

A line ends at "\\n" and nowhere else: a JSON string may hold characters, such as U+2028, that
`str.splitlines` takes for line ends too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from safetensors import SafetensorError, safe_open

from diffalign.errors import DataError, DiffalignError
from diffalign.parsing import checked, decode_text, parse_json, shortly

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

T = TypeVar("T")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DataError, naming `path`, where the disk refuses."""
    try:
        with disk_errors():
            yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}). What was written before stays; make room, and "
            f"start the same command again, a training run with --resume"
        ) from error


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError where the disk refuses what safetensors writes: its own error is no such."""
    try:
        yield
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))) is None:
            raise
        code = int(number[1] or number[2])  # safetensors 0.4 writes the second
        raise OSError(code, os.strerror(code)) from error


@contextmanager
def replacing_file(path: Path, *, draft: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to; on success what is there takes the place of `path`.

    Args:
        path: of the file.
        draft: what is written to, on the same disk; None is `path` with `.part` at its end. One of
            its own lets several processes write the same file.

    Whoever reads `path` meanwhile, or after a crash or a loss of power, finds the old content or
    the new, whole: the new file is on the disk before its name is, and so is the name on return.
    Every file that a later command reads is written through this or what builds on it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft or path.with_name(path.name + ".part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors():
            yield draft
        open_to_others(draft)
        flush(draft)
        draft.replace(path)
        flush(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes | str, *, draft: Path | None = None) -> None:
    """Write a file that is, whatever happens, either absent, old or complete.

    Args:
        path: its folder is made where there is none.
        content: bytes, or text that is written as UTF-8.
        draft: see `replacing_file`.
    """
    with replacing_file(path, draft=draft) as written:
        written.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value as a whole file, see `write_atomically`."""
    write_atomically(path, to_json(value, indent=1) + "\n")


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image as a whole PNG file, see `write_atomically`."""
    with replacing_file(path) as draft:
        image.save(draft, format="png")


_umask = os.umask(0o077)  # it can only be read by being set
os.umask(_umask)
_NEW_FILE = 0o666 & ~_umask


def open_to_others(path: Path) -> None:
    """Let those read a file who may read any new one: safetensors 0.8 keeps it to its owner."""
    with suppress(OSError):  # of a disk that knows no permissions
        path.chmod(_NEW_FILE)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish_tree(folder: Path) -> None:
    """Let others read all that was written in a folder, and wait until the disk has it."""
    for path in folder.rglob("*"):
        if path.is_file():
            open_to_others(path)
        flush(path)
    flush(folder)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that is valid UTF-8: half a surrogate pair, which JSON alone can spell, stays spelt."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, all of them or none.

    Raises:
        DataError: the disk refuses.
    """
    with writing(path):
        write_atomically(path, _as_lines(rows))


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line an object and wait until the disk has them; an unfinished line is cut first."""
    content = _as_lines(rows)
    with path.open("ab+") as file:
        _cut_unfinished_line(file)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def add_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line an object, all of them or none; lines that are there already are left out.

    What is there stays as it is; an unfinished last line is cut.

    Raises:
        DataError: the disk refuses.
    """
    there = path.read_bytes() if path.exists() else b""
    there = there[: there.rfind(b"\n") + 1]
    known = set(there.splitlines(keepends=True))
    new = dict.fromkeys(_as_lines([row]) for row in rows)
    with writing(path):
        write_atomically(path, there + b"".join(line for line in new if line not in known))


def read_bytes(
    path: Path, *, error: type[DiffalignError] = DataError, absent: str = "there is no such file"
) -> bytes:
    """The content of a file.

    Args:
        path: of the file.
        error: the class of the error.
        absent: what the message says where there is none, and perhaps where it is to be had.

    Raises:
        error: there is none, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as problem:
        raise error(f"{path}: {absent}") from problem
    except (OSError, ValueError) as problem:  # a name that no file can have is a ValueError
        raise error(f"{path}: cannot be read: {problem}") from problem


def read_text(
    path: Path, *, error: type[DiffalignError] = DataError, absent: str = "there is no such file"
) -> str:
    """A file of text, see `parsing.decode_text`; however a line ends there, it is `\\n` here.

    Raises:
        error: there is none, it cannot be read, or is no text.
    """
    text = decode_text(read_bytes(path, error=error, absent=absent), path, error=error)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(
    path: Path, *, error: type[DiffalignError] = DataError, absent: str = "there is no such file"
) -> Any:
    """A file of JSON, see `parsing.parse_json`.

    Raises:
        error: there is none, it cannot be read, or is no JSON.
    """
    return parse_json(read_bytes(path, error=error, absent=absent), path, error=error)


def read_json_lines(path: Path, *, error: type[DiffalignError] = DataError) -> list[Any]:
    """The objects of a file that this module wrote.

    A last line without its end is what a killed process leaves behind; it does not count.

    Raises:
        error: there is no file, or a line is not JSON; the message names it.
    """
    content = read_bytes(path, error=error)
    text = decode_text(content[: content.rfind(b"\n") + 1], path, error=error)
    return [parse_json(line, f"{path}: line {n}", error=error) for n, line in _numbered(text)]


def read_rows(cls: type[T], path: Path, *, error: type[DiffalignError] = DataError) -> list[T]:
    """`read_json_lines`, each line as a dataclass, see `parsing.checked`.

    Raises:
        error: also where a line has other keys than the dataclass, or values of other types.
    """
    return [
        checked(cls, row, f"{path}: line {number}", error=error)
        for number, row in enumerate(read_json_lines(path, error=error), start=1)
    ]


@contextmanager
def open_tensors(path: Path, *, error: type[DiffalignError] = DataError) -> Iterator[Any]:
    """A safetensors file, mapped into memory, as `safetensors.safe_open` gives it for torch.

    Raises:
        error: it is gone, damaged, or lacks what the body asks it for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except DiffalignError:
        raise
    except Exception as problem:  # a header can name types, shapes and places that do not exist
        raise error(
            f"{path}: cannot be read as safetensors ({type(problem).__name__}: {problem})"
        ) from problem


def read_tensors(path: Path, *, error: type[DiffalignError] = DataError) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU.

    Raises:
        error: it is gone or damaged.
    """
    with open_tensors(path, error=error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 23)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return digest.hexdigest()


def inside(folder: Path, name: str, *, error: type[DiffalignError] = DataError) -> Path:
    """The file in a folder that a list there names, which must lie in it.

    Args:
        folder: of the list.
        name: relative to it, with forward slashes.
        error: the class of the error.

    Raises:
        error: the name is empty, absolute, climbs out by `..`, or a link in it leads outside.
    """
    plain = PurePosixPath(name)
    bad = not plain.parts or plain.is_absolute() or ".." in plain.parts or "\0" in name
    if bad or PureWindowsPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise error(
            f"{folder}: names the file {shortly(name)}, and only files within this folder are read "
            f"or written: names are relative to it, and without `..`"
        )
    path = folder / plain
    try:
        is_within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as problem:  # a loop of links, or a name longer than any file's
        raise error(f"{path}: cannot be found: {problem}") from problem
    if not is_within:
        raise error(f"{path}: is a link to {path.resolve()}, outside of this folder: copy it there")
    return path


def numbered_lines(
    path: Path, *, absent: str = "there is no such file"
) -> Iterator[tuple[int, str]]:
    """The lines of a text that a person may have written, from 1, without the blank ones.

    The last one counts whether it is ended or not, and a byte order mark is no part of the first.

    Raises:
        DataError: there is no file, or it is no text.
    """
    text = read_text(path, absent=absent)
    return ((number, line) for number, line in _numbered(text) if line.strip())


def parse_json_line(line: str, path: Path, number: int) -> Any:
    """Parse line `number` of a file.

    Raises:
        DataError: it is not JSON.
    """
    return parse_json(line, f"{path}: line {number}")


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    lines = text.split("\n")
    return enumerate(lines if lines[-1] else lines[:-1], start=1)


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(to_json(row) + "\n" for row in rows).encode()


def _cut_unfinished_line(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
