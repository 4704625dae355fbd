"""Parquet files of an object store, found and opened through fsspec: s3://, gs://, hf:// and more.

Who may read them is the store's own business: its library takes keys from where it always does, as
from the environment or a profile. A config holds none, and no message shows one.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from diffalign.errors import DataError
from diffalign.keys import hide

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_INSTALLS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
"""Packages of stores that people name, where they are missing."""


@dataclass(frozen=True)
class StoredFile:
    """A file of an object store."""

    filesystem: Any
    """The fsspec file system; it pickles."""
    path: str
    """As the file system has it."""
    name: PurePosixPath
    """Below the folder that was named."""
    size: int
    """Bytes."""

    @property
    def suffix(self) -> str:
        """The ending of its name, with the dot."""
        return self.name.suffix

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """For reading at any place; nothing is read ahead.

        Raises:
            DataError: in place of whatever the store's libraries raise within.
        """
        try:
            with self.filesystem.open(self.path, "rb", cache_type="none") as file:
                yield file
        except DataError:
            raise
        except Exception as error:  # the errors of stores share no base class
            raise DataError(
                f"{self} cannot be read to its end: {_said(error)}. Once the store can be reached "
                f"again, continue the run from its last checkpoint with --resume"
            ) from error

    def __str__(self) -> str:
        return hide(self.filesystem.unstrip_protocol(self.path))


def is_address(path: str) -> bool:
    """Whether a path is that of a store: it begins with a protocol such as `s3://`."""
    return _ADDRESS.match(path) is not None


def find_files(address: str, suffix: str, *, section: str) -> list[StoredFile]:
    """The files of that ending at an address, in the order of their names, without hidden ones.

    Args:
        address: of a file, of a folder at any depth of which files lie, or a glob pattern.
        suffix: with the dot.
        section: of the config, for messages.

    Raises:
        DataError: the store is unknown or cannot be read, or nothing is there.
    """
    where = f"{section}.path {hide(address)}"
    _check(address, section)
    try:
        filesystem, root = fsspec.url_to_fs(address)
        if glob.has_magic(root):
            found = filesystem.glob(root, detail=True)
            root = re.split(r"/[^/]*[*?\[]", root, maxsplit=1)[0]
        else:
            found = filesystem.find(root, detail=True)
    except ImportError as error:
        package = _INSTALLS.get(urlsplit(address).scheme.lower())
        way_out = f"pip install {package}" if package else _said(error)
        raise DataError(
            f"{where}: the package that reads this store is missing: {way_out}"
        ) from error
    except Exception as error:  # the errors of stores share no base class
        raise DataError(
            f"{where} cannot be listed: {_said(error)}. Keys are taken from where the store's own "
            f"tools have them, such as the environment"
        ) from error
    files = []
    for path, entry in sorted(found.items()):
        below = path.removeprefix(root.rstrip("/")).lstrip("/")
        name = PurePosixPath(below or path.rpartition("/")[2])
        hidden = any(part.startswith(".") for part in name.parts)
        if entry.get("type") == "file" and name.suffix.lower() == suffix and not hidden:
            files.append(StoredFile(filesystem, path, name, int(entry.get("size") or 0)))
    if not files:
        raise DataError(
            f"{where} holds no {suffix} file, and these alone are read from an object store: copy "
            f"other data to this machine"
        )
    return files


def _check(address: str, section: str) -> None:
    """Raise DataError for an address with a key in it, or of no store."""
    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise DataError(
            f"{section}.path {hide(address)} has a user or a key in it, and a config is no place "
            f"for one: leave it to the environment or a profile, as the store's own tools do"
        )
    if parts.scheme.lower() in ("http", "https"):
        raise DataError(
            f"{section}.path {hide(address)} is no address of an object store, which could be "
            f"listed: give s3://, gs:// or hf://datasets/owner/name, or download the files"
        )


def _said(error: Exception) -> str:
    return hide(f"{type(error).__name__}: {error}")
