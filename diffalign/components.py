"""The folder is the registry: `kind: dpo` under `objective` is the module objectives/dpo.py.

A component is a concrete subclass of an abstract class, alone in its module. Its folder is the one
in which the abstract class is defined, so a new file is a new kind. From outside,
`kind: my_package.my_module` takes a module and `kind: ./my_module.py` a file; the code of either is
run by whoever loads the config. A family with a `default_kind` is given without `kind` as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
import typing
from pathlib import Path
from typing import Any, TypeVar

from diffalign import outside
from diffalign.errors import ConfigError, did_you_mean
from diffalign.parsing import shortly

T = TypeVar("T")


def _folder(abstract: type) -> str:
    return abstract.__module__.rpartition(".")[0]


def family(abstract: type) -> str:
    """Name of the folder of a family below diffalign, such as `objectives`."""
    return _folder(abstract).rpartition(".")[2]


def _module_names(abstract: type) -> dict[str, str]:
    """Kinds that the folder may hold -> their modules: its own, those of its subfolders (`sdxl` in
    models/diffusion), and a subfolder itself by its `config` (`pope` in benchmarks/pope)."""
    names: dict[str, str] = {}

    def look(package: str, *, inside: str | None) -> None:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            name = f"{package}.{module.name}"
            if module.ispkg:
                if inside is None:
                    look(name, inside=module.name)
            elif module.name == "config" and inside is not None:
                names[inside] = name
            else:
                names.setdefault(module.name, name)

    look(_folder(abstract), inside=None)
    return dict(sorted(names.items()))


def folder_kinds(package: str) -> list[str]:
    """Kinds of a family whose kinds are folders, by the files alone: nothing of them is imported.

    Args:
        package: of the family, such as `diffalign.benchmarks`; a kind is a folder with a `config`.
    """
    spec = importlib.util.find_spec(package)
    places = map(Path, (spec and spec.submodule_search_locations) or ())
    return sorted(file.parent.name for place in places for file in place.glob("*/config.py"))


def _concrete_in(module_name: str, abstract: type[T]) -> list[type[T]]:
    module = importlib.import_module(module_name)
    return [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if typing.get_origin(member) is None  # on Python 3.10, list[int] passes for a class
        and issubclass(member, abstract)
        and member.__module__ == module_name
        and not inspect.isabstract(member)
    ]


def kinds(abstract: type) -> list[str]:
    """Names of the modules of the folder that hold a component of this family; imports them."""
    return [
        name for name, module in _module_names(abstract).items() if _concrete_in(module, abstract)
    ]


def find(abstract: type[T], kind: str) -> type[T]:
    """The one concrete class of a kind.

    A module from outside is imported, which runs the code that the config names. It is looked for
    where Python looks, and in the working folder last; a path that ends in .py is a file.

    Args:
        abstract: the family, for example `AbstractObjective`.
        kind: a module of its folder, or from outside a dotted module path or a file.

    Raises:
        ConfigError: there is no such module, it cannot be imported, or it does not hold exactly one
            component.
    """
    folder = _folder(abstract)
    if kind.endswith(".py"):
        return _only(kind, outside.module_of(kind), abstract)
    if not all(part.isidentifier() for part in kind.split(".")):
        raise ConfigError(f"kind {shortly(kind)} is neither a name nor a dotted module path")
    modules = _module_names(abstract)
    if "." not in kind and kind not in modules:
        allowed = kinds(abstract)
        hint = did_you_mean(kind, allowed)
        if Path(f"{kind}.py").is_file():
            hint = f" {kind}.py lies here: write ./{kind}.py to take it."
        own = [*allowed, "or a dotted module path such as diffalign.playground.oracle"]
        raise ConfigError(f"there is no {kind!r} in {folder} (kinds: {', '.join(own)}).{hint}")
    module_name = kind if "." in kind else modules[kind]
    if "." in kind:
        _look_in_working_folder()
    return _only(kind, module_name, abstract)


def _only(kind: str, module_name: str, abstract: type[T]) -> type[T]:
    """The one component of a module; errors speak of the kind that the config has."""
    try:
        found = _concrete_in(module_name, abstract)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise ConfigError(
                f"kind {kind!r} needs the package {error.name}, which is not installed"
            ) from error
        raise ConfigError(
            f"kind {kind!r}: no module of that name can be imported. It is looked for in "
            f"{Path.cwd()} and where Python looks for packages"
        ) from error
    except Exception as error:
        if "." not in kind:
            raise
        raise ConfigError(f"kind {kind!r} cannot be imported: {_import_failure(error)}") from error
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise ConfigError(
            f"kind {kind!r}: {module_name} must hold exactly one concrete "
            f"{abstract.__name__}, and holds {names}"
        )
    return found[0]


def _look_in_working_folder() -> None:
    """Let modules of the working folder be imported: `python -m` has it on its path, and the
    installed command has not. Behind everything else, so that no package is shadowed."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)
        importlib.invalidate_caches()


def _import_failure(error: Exception) -> str:
    """The error of a module from outside, and where it was raised."""
    said = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return said
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})"


def kind_of(component: Any) -> str:
    """The `kind` under which a component is found again: the inverse of `find`."""
    cls = type(component)
    if (file := outside.file_of(cls.__module__)) is not None:
        return str(file)
    for base in cls.__mro__[1:]:
        if inspect.isabstract(base) and cls.__module__.startswith(f"{_folder(base)}."):
            parts = cls.__module__.split(".")
            kind = parts[-2] if parts[-1] == "config" else parts[-1]
            if _module_names(base).get(kind) == cls.__module__:
                return kind
    return cls.__module__
