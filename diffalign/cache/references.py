"""Log-likelihoods of a data set under the reference, on disk.

A folder holds `index.json`, which says what the values depend on, and safetensors files, each of
some consecutive pairs in one visit: view -> float32 [pairs], with the ids of the samples. Views
whose images are as they are have one visit; under a condition there are as many as the index says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffalign.commands import command
from diffalign.errors import CacheError
from diffalign.files import open_tensors, read_json, write_atomically, write_json, writing
from diffalign.parsing import checked, parse_json
from diffalign.ranges import AtLeast, Ranged
from diffalign.views import View

INDEX = "index.json"
_IDS = "sample_ids"


@dataclass(frozen=True, kw_only=True)
class Contents(Ranged):
    """Identity of a folder of reference values."""

    fingerprint: Mapping[str, Any]
    """Everything that the values depend on, by key: plain JSON values."""
    views: tuple[str, ...]
    """Names of views, sorted."""
    visits: Annotated[int, AtLeast(1)]
    """How many samples of random conditions there are, `draws` in the file."""
    pairs: Annotated[int, AtLeast(0)]
    """In the data set, those included that turn out to be unusable."""
    pairs_per_shard: Annotated[int, AtLeast(1)]
    """Of each file but the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for view in self.views:
            View.parse(view)

    @property
    def shards(self) -> list[Shard]:
        """The files that make it complete."""
        starts = range(0, self.pairs, self.pairs_per_shard)
        return [
            Shard(visit=visit, start=start, stop=min(start + self.pairs_per_shard, self.pairs))
            for visit in range(self.visits)
            for start in starts
        ]

    def views_of(self, visit: int) -> frozenset[str]:
        """The views that a visit adds: all of them at first, later those under a condition."""
        return frozenset(v for v in self.views if visit == 0 or View.parse(v).condition)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: a visit of the pairs with the numbers [start, stop)."""

    visit: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"draw-{self.visit}-pairs-{self.start:08d}.safetensors"


class ReferenceWriter:
    """Fills a folder; whatever stops it, the files that are there are whole."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        """Begin, or go on with what was started.

        Args:
            folder: created.
            contents: of it.

        Raises:
            CacheError: the folder holds other values than these.
        """
        self.folder, self.contents = folder, contents
        if (folder / INDEX).exists():
            _refuse_others(folder, _read_index(folder), contents)
            return
        with writing(folder):
            content = asdict(contents)
            content["draws"] = content.pop("visits")
            write_json(folder / INDEX, content)

    def missing(self) -> list[Shard]:
        """The values still to be written."""
        return _missing(self.folder, self.contents)

    def write(self, shard: Shard, ids: Sequence[str], values: Mapping[str, Tensor]) -> None:
        """Write a file.

        Args:
            shard: which one.
            ids: of n samples; fewer than the shard has pairs where some are unusable.
            values: view -> [n].

        Raises:
            DataError: the disk refuses.
        """
        assert values.keys() == self.contents.views_of(shard.visit)
        tensors = {view: value.float().cpu().contiguous() for view, value in values.items()}
        content = save(tensors, metadata={_IDS: json.dumps(list(ids))})
        with writing(self.folder):
            write_atomically(self.folder / shard.name, content)


class CachedReference:
    """Reference values by sample, view and visit, all of them in memory: four bytes each."""

    def __init__(self, folder: Path, *, rows: Mapping[str, int], values: Mapping[str, Tensor]):
        """Use `open`; this takes the parts.

        Args:
            folder: for messages.
            rows: sample id -> row.
            values: view -> float32 [rows, visits], NaN where there is none.
        """
        self._folder, self._rows, self._values = folder, rows, values

    @classmethod
    def open(
        cls, folder: Path, *, fingerprint: Mapping[str, Any], views: frozenset[str], visits: int
    ) -> CachedReference:
        """Read a folder.

        Args:
            folder: that `ReferenceWriter` filled.
            fingerprint: of this run; what it has no key for does not matter to it.
            views: that it asks for.
            visits: that it cycles through.

        Raises:
            CacheError: there is none, it is not complete, its values belong to other settings than
                this run's, or it lacks a view or a visit.
        """
        contents = _read_index(folder)
        _refuse_difference(folder, contents.fingerprint, fingerprint)
        lacking = sorted(views - set(contents.views))
        if lacking:
            raise CacheError(
                f"{folder} has the views {', '.join(contents.views)}, and this run needs "
                f"{', '.join(lacking)} as well. {_recompute()}"
            )
        if visits > contents.visits:
            raise CacheError(
                f"{folder} has {contents.visits} samples, and responses.visits is {visits}: "
                f"lower it, "
                f"or compute more. {_recompute()}"
            )
        missing = _missing(folder, contents)
        if missing:
            raise CacheError(
                f"{folder} is not complete: {len(missing)} of {len(contents.shards)} files are "
                f"missing. Finish it with the command that began it, "
                + command("precompute", {"reference_cache": folder}, config="CONFIG.yaml")
            )
        return cls._read(folder, contents, views)

    @classmethod
    def _read(cls, folder: Path, contents: Contents, views: frozenset[str]) -> CachedReference:
        rows: dict[str, int] = {}
        values = {
            view: torch.full((contents.pairs, _visits_of(view, contents)), torch.nan)
            for view in views
        }
        for shard in contents.shards:
            path = folder / shard.name
            try:
                with open_tensors(path, error=CacheError) as file:
                    header = parse_json(file.metadata()[_IDS], path, error=CacheError)
                    ids = checked(list[str], header, f"{path}: {_IDS}", error=CacheError)
                    asked = views & contents.views_of(shard.visit)
                    found = {view: file.get_tensor(view) for view in asked}
                shapes = {tuple(column.shape) for column in found.values()}
                if shapes > {(len(ids),)} or len(ids) > shard.stop - shard.start:
                    raise CacheError(f"it has {len(ids)} ids, and values of shape {shapes}")
                if len(rows.keys() | set(ids)) > contents.pairs:
                    raise CacheError("it has ids of other samples than the files before it")
            except CacheError as error:
                raise CacheError(
                    f"{path} is damaged ({error}): remove it, and have it computed again with "
                    f"diffalign precompute CONFIG.yaml reference_cache={folder}"
                ) from error
            numbers = [rows.setdefault(name, len(rows)) for name in ids]
            places = torch.tensor(numbers, dtype=torch.int64)  # there may be none
            for view, column in found.items():
                values[view][places, shard.visit] = column
        return cls(folder, rows=rows, values=values)

    def __call__(self, sample_ids: Sequence[str], visits: Sequence[int]) -> dict[str, Tensor]:
        """The reference's values of n samples: view -> float32 [n], on the CPU.

        Raises:
            CacheError: a sample was not there, or could not be used, when they were computed.
        """
        unknown = [name for name in sample_ids if name not in self._rows]
        if unknown:
            raise CacheError(f"{self._folder} has no values of {unknown[0]}. {_recompute()}")
        rows = torch.tensor([self._rows[name] for name in sample_ids])
        numbers = torch.tensor(visits)
        found = {
            view: values[rows, numbers % values.shape[1]] for view, values in self._values.items()
        }
        for view, values in found.items():
            if values.isnan().any():
                name = sample_ids[int(values.isnan().nonzero()[0])]
                raise CacheError(f"{self._folder} has no value of {name}, {view}. {_recompute()}")
        return found


def _visits_of(view: str, contents: Contents) -> int:
    return contents.visits if View.parse(view).condition else 1


def _missing(folder: Path, contents: Contents) -> list[Shard]:
    return [shard for shard in contents.shards if not (folder / shard.name).exists()]


def _read_index(folder: Path) -> Contents:
    path = folder / INDEX
    if not path.is_file():
        raise CacheError(
            f"{folder} holds no reference values: compute them with diffalign precompute "
            f"CONFIG.yaml reference_cache={folder}"
        )
    content = read_json(path, error=CacheError)
    if isinstance(content, dict) and "draws" in content:
        content["visits"] = content.pop("draws")
    try:
        return checked(Contents, content, path, error=CacheError)
    except CacheError as error:
        raise CacheError(f"{path} is no index of reference values: {error}") from error


def _refuse_others(folder: Path, there: Contents, ours: Contents) -> None:
    """Raise CacheError unless a folder that was started is that of these contents."""
    _refuse_difference(folder, there.fingerprint, ours.fingerprint)
    for name in ("views", "visits", "pairs", "pairs_per_shard"):
        before, now = getattr(there, name), getattr(ours, name)
        if before != now:
            raise CacheError(
                f"{folder} was started with other {name}: {before!r} there, {now!r} here. "
                f"{_recompute()}"
            )


def _refuse_difference(folder: Path, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(ours))  # as a file gives it back: tuples are lists there
    for key, value in plain.items():
        if there.get(key) != value:
            raise CacheError(
                f"{folder} was computed under other settings: {key} was {there.get(key)!r} there "
                f"and is {value!r} here. {_recompute()}"
            )


def _recompute() -> str:
    return (
        "Compute this run's own with diffalign precompute CONFIG.yaml "
        "reference_cache=ANOTHER_FOLDER, or remove the folder and compute it again"
    )
