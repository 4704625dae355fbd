"""Single files as modules: `kind: ./my_loss.py` is a file that a config names, and its code is run.

The folder of such a file becomes a package under this module, its path written in hexadecimal:
`/home/me/my_loss.py` is `diffalign.outside.in_2f686f6d652f6d65.my_loss`. So files of one name in
two folders are two modules, a file may import its neighbours (`from .layers import ...`), and a
process that is started anew finds the module by its name alone, as data workers do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from diffalign.errors import ConfigError, did_you_mean

__path__: list[str] = []
"""Makes this module a package, of which the finder below knows the parts."""

_FOLDER = f"{__name__}.in_"


class _Folders:
    """Finds the package that a folder is; Python itself finds the files in it."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(_FOLDER) or "." in name[len(_FOLDER) :]:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [bytes.fromhex(name[len(_FOLDER) :]).decode()]
        return spec


if _Folders not in sys.meta_path:
    sys.meta_path.append(_Folders)


def module_of(file: str) -> str:
    """The name under which a file is imported.

    Args:
        file: path of a `.py` file, absolute or from the working folder.

    Raises:
        ConfigError: there is no such file, or it has a name that no module can have.
    """
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        near = sorted(map(str, path.parent.glob("*.py"))) if path.parent.is_dir() else []
        raise ConfigError(f"kind {file}: there is no file {path}.{did_you_mean(str(path), near)}")
    if not path.stem.isidentifier():
        raise ConfigError(
            f"kind {file}: {path.name} is no name of a module: use letters, digits and "
            f"underscores in front of .py"
        )
    importlib.invalidate_caches()  # it may have been written a moment ago
    return f"{_FOLDER}{str(path.parent.resolve()).encode().hex()}.{path.stem}"


def file_of(module: str) -> Path | None:
    """The file that a module is, where it is one from outside: the inverse of `module_of`."""
    folder, _, stem = module.removeprefix(_FOLDER).partition(".")
    if not module.startswith(_FOLDER):
        return None
    return Path(bytes.fromhex(folder).decode()) / f"{stem}.py"
