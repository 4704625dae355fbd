"""Log-likelihoods of a data set under the reference, on disk.

A folder of shards, each of some consecutive pairs in one visit: view -> float32 [pairs], with the
ids of the samples. Views of which nothing is random have one visit; the others have as many as the
index says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from diffalign.cache.shards import Identity, Kind, ShardReader, ShardWriter
from diffalign.errors import CacheError
from diffalign.parsing import checked
from diffalign.ranges import AtLeast, Ranged
from diffalign.views import View

REFERENCE_VALUES = Kind(name="reference values", setting="reference_cache", unmarked=True)
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
    varying: tuple[str, ...] | None = None
    """Views of which each visit shows something else, sorted; None for those under a condition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for view in self.views:
            View.parse(view)

    def identity(self) -> Identity:
        """It, as the index of a folder of shards has it."""
        layout = {
            "views": list(self.views),
            "draws": self.visits,
            "pairs": self.pairs,
            "pairs_per_shard": self.pairs_per_shard,
        }
        if self.varying is not None:
            layout["varying"] = list(self.varying)
        return Identity(fingerprint=self.fingerprint, layout=layout)

    @classmethod
    def of(cls, identity: Identity, where: Path) -> Contents:
        """What an index says.

        Raises:
            CacheError: it says something else.
        """
        layout = dict(identity.layout)
        if "draws" in layout:
            layout["visits"] = layout.pop("draws")
        content = {"fingerprint": identity.fingerprint, **layout}
        return checked(cls, content, f"{where}: index.json", error=CacheError)

    @property
    def shards(self) -> list[Shard]:
        """The files that make it complete."""
        starts = range(0, self.pairs, self.pairs_per_shard)
        return [
            Shard(visit=visit, start=start, stop=min(start + self.pairs_per_shard, self.pairs))
            for visit in range(self.visits)
            for start in starts
        ]

    def bytes_of(self, shards: Sequence[Shard]) -> int:
        """Of the values of some files, if every pair can be used."""
        values = sum((s.stop - s.start) * len(self.views_of(s.visit)) for s in shards)
        return values * torch.float32.itemsize

    def views_of(self, visit: int) -> frozenset[str]:
        """The views that a visit adds: all of them at first, later those that vary."""
        return frozenset(view for view in self.views if visit == 0 or self.varies(view))

    def varies(self, view: str) -> bool:
        """Whether each visit of a sample shows something else in this view."""
        if self.varying is None:
            return View.parse(view).condition is not None
        return view in self.varying


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
        self._shards = {shard.name: shard for shard in contents.shards}
        self._writer = ShardWriter(folder, REFERENCE_VALUES, contents.identity(), [*self._shards])
        self.is_whole = self._writer.is_whole

    def missing(self) -> list[Shard]:
        """The values still to be written, those included whose files are damaged."""
        return [self._shards[name] for name in self._writer.missing()]

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
        numbers = {view: value.float() for view, value in values.items()}
        self._writer.write(shard.name, numbers, {_IDS: list(ids)})


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
        reader = ShardReader(folder, REFERENCE_VALUES, fingerprint)
        contents = Contents.of(reader.identity, folder)
        lacking = sorted(views - set(contents.views))
        if lacking:
            raise CacheError(
                f"{folder} has the views {', '.join(contents.views)}, and this run needs "
                f"{', '.join(lacking)} as well. {REFERENCE_VALUES.compute_others}"
            )
        if visits > contents.visits:
            raise CacheError(
                f"{folder} has {contents.visits} samples, and responses.visits is {visits}: "
                f"lower it, or compute more. {REFERENCE_VALUES.compute_others}"
            )
        reader.check([shard.name for shard in contents.shards])
        return cls._read(reader, contents, views)

    @classmethod
    def _read(
        cls, reader: ShardReader, contents: Contents, views: frozenset[str]
    ) -> CachedReference:
        rows: dict[str, int] = {}
        values = {
            view: torch.full(
                (contents.pairs, contents.visits if contents.varies(view) else 1), torch.nan
            )
            for view in views
        }
        for shard in contents.shards:
            tensors, metadata = reader.read(shard.name)
            asked = views & contents.views_of(shard.visit)
            with reader.told_of_damage(shard.name):
                ids = checked(list[str], metadata.get(_IDS), _IDS, error=CacheError)
                found = {view: tensors[view] for view in asked if view in tensors}
                shapes = {tuple(column.shape) for column in found.values()}
                fits = shapes <= {(len(ids),)} and len(ids) <= shard.stop - shard.start
                if found.keys() != asked or not fits:
                    raise CacheError(f"it has {len(ids)} ids, and values of shape {shapes}")
                if len(rows.keys() | set(ids)) > contents.pairs:
                    raise CacheError("it has ids of other samples than the files before it")
            numbers = [rows.setdefault(name, len(rows)) for name in ids]
            places = torch.tensor(numbers, dtype=torch.int64)  # there may be none
            for view, column in found.items():
                values[view][places, shard.visit] = column.float()
        return cls(reader.folder, rows=rows, values=values)

    def all_of(self, sample_id: str) -> dict[str, list[float]]:
        """The values of a sample: view -> one a visit; none where it could not be used."""
        row = self._rows.get(sample_id)
        if row is None:
            return {}
        found = {view: values[row] for view, values in self._values.items()}
        return {view: row[~row.isnan()].tolist() for view, row in found.items()}

    def __call__(self, sample_ids: Sequence[str], visits: Sequence[int]) -> dict[str, Tensor]:
        """The reference's values of n samples: view -> float32 [n], on the CPU.

        Raises:
            CacheError: a sample was not there, or could not be used, when they were computed.
        """
        unknown = [name for name in sample_ids if name not in self._rows]
        if unknown:
            raise CacheError(
                f"{self._folder} has no values of {unknown[0]}. {REFERENCE_VALUES.compute_others}"
            )
        rows = torch.tensor([self._rows[name] for name in sample_ids])
        numbers = torch.tensor(visits)
        found = {
            view: values[rows, numbers % values.shape[1]] for view, values in self._values.items()
        }
        for view, values in found.items():
            if values.isnan().any():
                name = sample_ids[int(values.isnan().nonzero()[0])]
                raise CacheError(
                    f"{self._folder} has no value of {name}, {view}. "
                    f"{REFERENCE_VALUES.compute_others}"
                )
        return found
