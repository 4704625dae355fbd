"""Checkpoints that survive anything: written aside, flushed, renamed; safetensors and JSON only.

A checkpoint folder holds one safetensors file per group of tensors (weights, optimizer, average,
one per rank) and `state.json`. It appears under its name only when complete, whatever was killed or
filled up while it was written. What happens to it afterwards shows when it is read: `state.json`
lists every file with its size and SHA-256, and carries a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffalign import world
from diffalign.errors import CheckpointError, DataError
from diffalign.files import flush, open_tensors, open_to_others, read_tensors, sha256_of
from diffalign.models.sharding import is_sharded, sharded_as
from diffalign.parsing import parse_json
from diffalign.training.shard_files import all_or_none, read_groups, write_shards

PREFIX = "checkpoint-"
STATE = "state.json"
SHARDS = "shards"
"""Folder of what processes had parts of, in a checkpoint."""
_NAME = re.compile(rf"{PREFIX}(?:0|[1-9][0-9]*)", re.ASCII)
_FILES, _DIGEST = "files", "sha256"
"""Keys of `state.json` besides those of the state."""
_OLD_STATE = {
    "identity": dict,
    "source": dict,
    "schedule": dict,
    "optimizer": dict,
    "bad_steps": int,
    "bad_in_a_row": int,
}
"""What a state without digests has to hold, to be taken for that of an older version."""
_LITTER = {"Thumbs.db", "desktop.ini"}
"""What systems leave in folders that somebody looks into, besides hidden files."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after an optimiser step."""

    step: int
    """Optimiser steps done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Group name -> tensors by name, on the CPU."""
    state: Mapping[str, Any]
    """Everything else: plain JSON values."""


@dataclass(frozen=True)
class StartingPoint:
    """Where a run goes on from."""

    path: Path | None
    """A checkpoint that is whole; None where the run never came to one."""
    notes: tuple[str, ...]
    """Sentences for the user: which checkpoints were passed over and why, and what could not be
    checked."""


def checkpoints_in(output: Path) -> list[Path]:
    """The checkpoints of a run folder by their names, oldest first; whether they are whole,
    `verify` says."""
    found = [path for path in output.glob(f"{PREFIX}*") if _is_named_right(path) and path.is_dir()]
    return sorted(found, key=_step_in_name)


def misnamed_in(output: Path) -> list[str]:
    """Sentences on what is called like a checkpoint of a run folder and is none."""
    sentences = []
    for path in sorted(output.glob(f"{PREFIX}*")):
        if not path.is_dir():
            sentences.append(f"{path} is a file, where a checkpoint is a folder")
        elif not _is_named_right(path):
            held = "" if (path / STATE).is_file() else f" and has no {STATE}"
            sentences.append(
                f"{path} is not called {PREFIX} and the number of its step as they are{held}"
            )
    return sentences


def save_checkpoint(output: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `keep`, and later steps: they are
    those of a run that was resumed from before them, and so given up.

    Every process must call. The main one writes; of tensors that are shared out each process writes
    its own part.

    Raises:
        CheckpointError: it could not be written, on every process alike; older checkpoints are
            untouched.
    """
    final = output / f"{PREFIX}{checkpoint.step}"
    partial = output / f".{final.name}.partial"
    shards = {
        f"{group}/{name}": tensor
        for group, tensors in checkpoint.tensors.items()
        for name, tensor in tensors.items()
        if is_sharded(tensor)
    }
    try:
        all_or_none(lambda: _clear(partial) if world.is_main() else None)
        sealed: dict[str, Any] = {}
        if shards:
            mine = all_or_none(lambda: _write_shards(partial, shards))
            sealed = {name: seal for files in world.gather(mine) for name, seal in files.items()}
        all_or_none(lambda: _write(partial, checkpoint, sealed) if world.is_main() else None)
    except OSError as error:
        if world.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints_in(output)
        survivor = f"{kept[-1]} is left as it was" if kept else "there is no older one"
        free = shutil.disk_usage(output).free / 2**20 if output.is_dir() else 0.0
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); {survivor}. "
            f"{free:.0f} MiB are free there: make room, or lower training.keep_checkpoints"
        ) from error
    if world.is_main():
        existing = checkpoints_in(output)
        current = existing.index(final)
        for old in [*existing[: max(0, current + 1 - keep)], *existing[current + 1 :]]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _clear(partial: Path) -> None:
    _remove(partial)
    partial.mkdir(parents=True)


def _write_shards(partial: Path, shards: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write this process's part; gives size and digest of its files."""
    return {f"{SHARDS}/{f.name}": _sealed(f) for f in write_shards(partial / SHARDS, shards)}


def _write(partial: Path, checkpoint: Checkpoint, sealed: Mapping[str, Any]) -> None:
    """Write all that is whole, and give the folder its name."""
    with ThreadPoolExecutor() as pool:  # one file is hashed while the next one is written
        seals = {}
        for group, tensors in checkpoint.tensors.items():
            path = partial / f"{group}.safetensors"
            whole = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
            cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
            save_file(cpu, path)
            seals[path.name] = pool.submit(_sealed, path)
        files = {name: seal.result() for name, seal in seals.items()} | dict(sealed)
    state = {"step": checkpoint.step, **checkpoint.state, _FILES: files}
    path = partial / STATE
    path.write_text(json.dumps({**state, _DIGEST: _digest_of_state(state)}), encoding="utf-8")
    for written in (path, partial / SHARDS, partial):
        if written.exists():
            flush(written)
    _put_in_place(partial, partial.with_name(f"{PREFIX}{checkpoint.step}"))


def load_checkpoint(
    path: Path,
    *,
    verified: bool = False,
    like: Callable[[str, str], Tensor | None] = lambda group, name: None,
) -> Checkpoint:
    """Read a checkpoint folder.

    Args:
        path: the folder.
        verified: it has just been verified, and its files are not hashed again.
        like: of a group and a name, a tensor as which the one of that name is shared out, where it
            has the same shape; None where it is read whole.

    Raises:
        CheckpointError: there is none, or it is damaged; an older one that is whole is named.
    """
    if not verified:
        named_point(path)
    state = _read_state(path)
    try:
        tensors = {f.stem: read_tensors(f) for f in sorted(path.glob("*.safetensors"))}
        for group, values in tensors.items():
            for name, value in values.items():
                if (shared := like(group, name)) is not None and shared.shape == value.shape:
                    values[name] = sharded_as(value, shared)
        if (path / SHARDS).is_dir():
            for group, values in read_groups(path / SHARDS, like).items():
                tensors.setdefault(group, {}).update(values)
    except (DataError, SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    for key in (_FILES, _DIGEST):
        state.pop(key, None)
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def identity_of(path: Path) -> Mapping[str, Any]:
    """The identity of the run that a checkpoint belongs to; empty where it says none.

    Raises:
        CheckpointError: the folder is no checkpoint, or was changed.
    """
    found = _read_state(path).get("identity")
    return found if isinstance(found, dict) else {}


def verify(path: Path) -> bool:
    """Read a checkpoint once from end to end and compare it with what was written.

    Returns:
        Whether it carries digests; those that older versions wrote do not, and damage that leaves
        every file readable cannot be seen in them.

    Raises:
        CheckpointError: it is damaged; the message says what is.
    """
    state = _read_state(path)
    if _FILES not in state:
        for file in sorted(path.glob("*.safetensors")):
            try:
                with open_tensors(file):
                    pass
            except DataError as error:
                raise _damaged(path, f"{file.name} cannot be read: {error}") from error
        for group in ("weights", "rank-0"):
            if not (path / f"{group}.safetensors").is_file():
                raise _damaged(path, f"{group}.safetensors is missing")
        return False
    files: dict[str, dict[str, Any]] = state[_FILES]
    for name, seal in files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if (size := file.stat().st_size) != (written := seal["bytes"]):
            raise _damaged(path, f"{name} has {size:,} bytes and was written with {written:,}")
    entries = [*path.iterdir(), *(path / SHARDS).glob("*")]
    names = [file.relative_to(path).as_posix() for file in entries if file != path / SHARDS]
    foreign = [name for name in names if name not in {*files, STATE}]
    if foreign := sorted(name for name in foreign if not _is_litter(name)):
        raise _damaged(
            path, f"it holds {foreign[0]}, which is no file of it; move that elsewhere to use it"
        )
    with ThreadPoolExecutor() as pool:
        try:
            digests = list(pool.map(sha256_of, [path / name for name in files]))
        except OSError as error:
            raise _damaged(path, str(error)) from error
    for (name, seal), digest in zip(files.items(), digests, strict=True):
        if digest != seal[_DIGEST]:
            raise _damaged(path, f"{name} has changed since it was written: its SHA-256 differs")
    return True


def starting_point(output: Path) -> StartingPoint:
    """The newest checkpoint of a run folder that is whole; nothing in the folder is changed.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    existing = checkpoints_in(output)
    notes = [f"{sentence}: it is left alone" for sentence in misnamed_in(output)]
    passed: list[str] = []
    for path in reversed(existing):
        try:
            digested = verify(path)
        except CheckpointError as error:
            passed.append(str(error))
            continue
        return StartingPoint(path, (*notes, *passed, *_undigested(path, digested)))
    if passed:
        listed = "\n  ".join(passed)
        raise CheckpointError(
            f"{output}: no checkpoint of this run can be used, and nothing was changed:\n"
            f"  {listed}\n"
            f"Put back a copy of one of them, or start afresh in another folder with output=..."
        )
    if holds_misnamed_checkpoint(output):
        raise CheckpointError(
            f"{output}: there is no checkpoint under its own name, and so nothing was changed. "
            f"{'; '.join(misnamed_in(output))}. Give it back its name, or name it with "
            f"--resume-from, or start afresh in another folder with output=..."
        )
    return StartingPoint(None, tuple(notes))


def named_point(path: Path) -> StartingPoint:
    """A checkpoint that the user named.

    Raises:
        CheckpointError: it is damaged, or none; another one of its run that is whole is named.
    """
    try:
        return StartingPoint(path, _undigested(path, verify(path)))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_hint(path)}") from error


def holds_misnamed_checkpoint(output: Path) -> bool:
    """Whether there is a checkpoint under a name that none is written under."""
    return any(
        (path / STATE).is_file() and not _is_named_right(path) for path in output.glob(f"{PREFIX}*")
    )


def clear_unfinished(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for partial in output.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def undo_replacement(output: Path) -> None:
    """Give back its name to a checkpoint that a killed process was about to replace."""
    for replaced in output.glob(f".{PREFIX}*.replaced"):
        final = output / replaced.name[1:].removesuffix(".replaced")
        if final.exists():
            _remove(replaced)
        else:
            replaced.rename(final)


def check_room(output: Path, needed: int) -> None:
    """Raise CheckpointError where a disk has not the room for one checkpoint.

    Args:
        output: the run folder.
        needed: bytes that a checkpoint takes at least.
    """
    free = shutil.disk_usage(output).free
    if free < needed:
        raise CheckpointError(
            f"{output}: a checkpoint of this run takes at least {needed / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} MiB are free there, so that it could never be saved. Make room, "
            f"or choose another folder with output=..."
        )


def _is_litter(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith(".") or last in _LITTER


def _is_named_right(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def _step_in_name(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: the checkpoint is damaged: {what}")


def _undigested(path: Path, digested: bool) -> tuple[str, ...]:
    sentence = (
        f"{path} is of an older version, without digests: its files can be read, and whether a "
        f"value in them has changed cannot be known"
    )
    return () if digested else (sentence,)


def _hint(path: Path) -> str:
    """Which other checkpoint of the same run could be taken."""
    for other in reversed(checkpoints_in(path.parent)):
        if other.resolve() == path.resolve():
            continue
        try:
            verify(other)
        except CheckpointError:
            continue
        return f"; resume from {other} instead"
    return ""


def _read_state(path: Path) -> dict[str, Any]:
    """What `state.json` says, its digest compared.

    Raises:
        CheckpointError: it is no such file, or was changed.
    """
    file = path / STATE
    if not file.is_file():
        raise CheckpointError(f"{path}: not a checkpoint: it has no {STATE}")
    try:
        state = parse_json(file.read_bytes(), STATE, error=CheckpointError)
    except (OSError, CheckpointError) as error:
        raise _damaged(path, f"{STATE} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path, f"{STATE} holds a {type(state).__name__}, not an object")
    if (_FILES in state) != (_DIGEST in state):
        raise _damaged(path, f"{STATE} has changed since it was written")
    if _DIGEST in state:
        digest = state[_DIGEST]
        if digest != _digest_of_state({k: v for k, v in state.items() if k != _DIGEST}):
            raise _damaged(path, f"{STATE} has changed since it was written: its digest differs")
    else:
        for key, kind in _OLD_STATE.items():
            if not isinstance(state.get(key), kind):
                raise _damaged(path, f"{STATE} has no {key} such as a checkpoint has")
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise _damaged(path, f"{STATE} has no number of a step")
    if _is_named_right(path) and _step_in_name(path) != step:
        raise _damaged(path, f"it holds step {step}, and its name says otherwise")
    return state


def _digest_of_state(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state, however its JSON is laid out."""
    plain = json.loads(json.dumps(state))  # keys as a file gives them back: all of them text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sealed(path: Path) -> dict[str, Any]:
    """Size and digest of a file that the disk has."""
    open_to_others(path)
    flush(path)
    return {"bytes": path.stat().st_size, _DIGEST: sha256_of(path)}


def _put_in_place(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name; one that has it already goes after that, not before."""
    replaced = final.with_name(f".{final.name}.replaced")
    _remove(replaced)
    if final.is_symlink() or final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.is_symlink() or replaced.exists():
            replaced.rename(final)
        raise
    flush(final.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
