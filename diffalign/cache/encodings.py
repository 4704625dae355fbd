"""Encodings of image pairs and of their captions, on disk.

Shards `pairs-...` hold consecutive pairs: one tensor each, [views, ways, channels, h, w], what the
autoencoder made of its images, with all that a batch says of a pair next to them, or why it cannot
be used. Shards `prompts-...` hold captions, equal ones once and the empty one first. Every image
and every caption has a checksum of its own, which is compared whenever it is read.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.cache.shards import Identity, Kind, OpenShard, ShardReader, ShardWriter
from diffalign.data.pairs.encoded import (
    AbstractEncodedPairs,
    DecodedPair,
    EncodedPrompt,
    PairsToEncode,
    Way,
)
from diffalign.data.pairs.transforms import CutImage
from diffalign.data.skipping import Skipped, SkipReason
from diffalign.data.strength.base import Strength
from diffalign.errors import CacheError

KIND = Kind(name="encodings of image pairs", setting="encodings_cache")
_SHARD_BYTES = 1 << 26
_SHARD_PAIRS, _SHARD_PROMPTS = 256, 256
"""At most: a computation that is killed loses what it did of one shard of each process."""
_OPEN_SHARDS = 128


@dataclass(frozen=True, kw_only=True)
class EncodingShapes:
    """What encoders make of one image and of one caption."""

    factor: int
    """Pixels per latent, along either side."""
    posterior: str
    """`full` or `mean`."""
    channels: int
    """Of what is kept of an image: of a whole posterior twice those of a latent."""
    latent_dtype: torch.dtype
    prompt: Mapping[str, tuple[int, ...]]
    """Name -> shape of one caption's part."""
    prompt_dtype: torch.dtype

    @property
    def prompt_bytes(self) -> int:
        """Of one caption."""
        numbers = sum(math.prod(shape) for shape in self.prompt.values())
        return numbers * self.prompt_dtype.itemsize

    def image_bytes(self, size: tuple[int, int]) -> int:
        """Of one image of (height, width) pixels."""
        height, width = (side // self.factor for side in size)
        return self.channels * height * width * self.latent_dtype.itemsize


class EncodingsLayout:
    """How the encodings of a run are cut into shards, and what they take."""

    def __init__(self, pairs: PairsToEncode, shapes: EncodingShapes) -> None:
        """Lay out.

        Args:
            pairs: what is encoded.
            shapes: what becomes of one image and of one caption.
        """
        self.pairs, self.shapes = pairs, shapes
        each = [
            len(pairs.views) * len(pairs.ways_of(position)) * shapes.image_bytes(target)
            for position, target in enumerate(pairs.targets)
        ]
        self.pair_bytes = each
        per_shard = max(1, _SHARD_BYTES // max(each))
        self.pairs_per_shard = min(per_shard, _SHARD_PAIRS)
        per_shard = max(1, _SHARD_BYTES // shapes.prompt_bytes)
        self.prompts_per_shard = min(per_shard, _SHARD_PROMPTS)

    @property
    def bytes(self) -> int:
        """Of all tensors, if every pair can be used."""
        return sum(self.pair_bytes) + len(self.pairs.prompts) * self.shapes.prompt_bytes

    def bytes_of(self, shards: Sequence[str]) -> int:
        """Of the tensors of some shards."""
        return sum(
            sum(self.pair_bytes[i] for i in self.positions(name))
            if is_of_pairs(name)
            else len(self.positions(name)) * self.shapes.prompt_bytes
            for name in shards
        )

    @property
    def shards(self) -> list[str]:
        """Names of all files; those of captions come first."""
        return [
            *_names("prompts", len(self.pairs.prompts), self.prompts_per_shard),
            *_names("pairs", len(self.pairs), self.pairs_per_shard),
        ]

    def positions(self, shard: str) -> range:
        """Which pairs, or which captions, a shard holds."""
        start = int(Path(shard).stem.rpartition("-")[2])
        if is_of_pairs(shard):
            return range(start, min(start + self.pairs_per_shard, len(self.pairs)))
        return range(start, min(start + self.prompts_per_shard, len(self.pairs.prompts)))

    def plain(self) -> dict[str, Any]:
        """For the index of a folder."""
        return {
            "model.posterior": self.shapes.posterior,
            "views": self.pairs.views,
            "data.crops and data.flip (place, mirrored)": self.pairs.ways,
            "pairs": len(self.pairs),
            "pairs_per_shard": self.pairs_per_shard,
            "prompts": len(self.pairs.prompts),
            "prompts_per_shard": self.prompts_per_shard,
        }


def _names(what: str, count: int, per_shard: int) -> list[str]:
    return [f"{what}-{start:08d}.safetensors" for start in range(0, count, per_shard)]


def is_of_pairs(shard: str) -> bool:
    """Whether a shard holds pairs, rather than captions."""
    return shard.startswith("pairs-")


class EncodingsWriter:
    """Fills a folder of encodings."""

    def __init__(
        self, folder: Path, layout: EncodingsLayout, fingerprint: Mapping[str, Any]
    ) -> None:
        """Begin, or go on with what was started; see `ShardWriter`."""
        identity = Identity(fingerprint=fingerprint, layout=layout.plain())
        self.folder, self.layout = folder, layout
        self._writer = ShardWriter(folder, KIND, identity, layout.shards)
        self.missing, self.is_whole = self._writer.missing, self._writer.is_whole

    def write_prompts(self, shard: str, encoded: Mapping[str, Tensor]) -> None:
        """Write captions.

        Args:
            shard: of captions.
            encoded: name -> [n, ...], what the text encoders made of them.
        """
        prompts = list(self.layout.pairs.prompts)
        texts = [prompts[number] for number in self.layout.positions(shard)]
        rows = [{name: part[row] for name, part in encoded.items()} for row in range(len(texts))]
        sums = [_checksum(*(parts[name] for name in sorted(parts))) for parts in rows]
        self._writer.write(shard, encoded, {"prompts": texts, "checksums": sums})

    def write_pairs(
        self, shard: str, found: Sequence[tuple[DecodedPair, Tensor] | Skipped]
    ) -> None:
        """Write pairs.

        Args:
            shard: of pairs.
            found: for each of them, what it is and the encodings of its images, [views, ways,
                channels, h, w]; or why it cannot be used.
        """
        positions = self.layout.positions(shard)
        tensors, entries = {}, []
        for position, each in zip(positions, found, strict=True):
            if isinstance(each, Skipped):
                entries.append(_of_skipped(each))
            else:
                pair, encoded = each
                entries.append(self._entry(pair, encoded, self.layout.pairs.ways_of(position)))
                tensors[str(position)] = encoded
        self._writer.write(shard, tensors, {"pairs": entries})

    def _entry(self, pair: DecodedPair, encoded: Tensor, ways: Sequence[Way]) -> dict[str, Any]:
        return {
            "sample_id": pair.sample_id,
            "prompt": self.layout.pairs.prompts[pair.prompt],
            "caption": pair.prompt,
            "ways": list(ways),
            "views": {
                view: [
                    [*images[way].original_size, *images[way].corner, _checksum(encoded[v, w])]
                    for w, way in enumerate(ways)
                ]
                for v, (view, images) in enumerate(pair.images.items())
            },
        }


def unusable_in(writer: EncodingsWriter, shards: Sequence[str]) -> Counter[str]:
    """Why pairs of some shards cannot be used, and how many; reads their headers alone."""
    reader = ShardReader(writer.folder, KIND, {})
    entries = [entry for name in shards for entry in reader.open(name).metadata["pairs"]]
    return Counter(entry["reason"] for entry in entries if "reason" in entry)


def _of_skipped(skipped: Skipped) -> dict[str, Any]:
    return {
        "sample_id": skipped.sample_id,
        "reason": skipped.reason.value,
        "detail": skipped.detail,
        "side": skipped.side,
    }


def _checksum(*tensors: Tensor) -> int:
    """CRC-32 of the bytes of tensors, one after the other."""
    found = 0
    for tensor in tensors:
        content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = zlib.crc32(content.data, found)
    return found


class CachedPairs(AbstractEncodedPairs):
    """Pairs of a folder of encodings, read as they are asked for."""

    def __init__(
        self, reader: ShardReader, layout: Mapping[str, Any], pairs: PairsToEncode, *, half: bool
    ) -> None:
        """Use `open`; this takes the parts."""
        self._reader, self._layout = reader, layout
        self._numbers, self._strengths = pairs.numbers, pairs.strengths
        self._opened: OrderedDict[str, _MappedShard] = OrderedDict()
        self.half = half
        """Whether the means are taken of posteriors that are there as a whole."""
        self._views: list[str] = layout["views"]

    @classmethod
    def open(
        cls, folder: Path, pairs: PairsToEncode, fingerprint: Mapping[str, Any], *, posterior: str
    ) -> CachedPairs:
        """Read the index of a folder, and the headers of its shards.

        Args:
            folder: that `EncodingsWriter` filled.
            pairs: of this run.
            fingerprint: of this run.
            posterior: what this run takes of one, `full` or `mean`.

        Raises:
            CacheError: there is none, it is not complete, it lacks a view or a way to see an image,
                or it belongs to other settings than this run's.
        """
        reader = ShardReader(folder, KIND, fingerprint)
        layout = reader.identity.layout
        again = KIND.compute_others
        if layout["model.posterior"] != posterior == "full":
            raise CacheError(
                f"{folder} has the means of posteriors alone, and model.posterior is full. {again}"
            )
        for what, there, ours in (
            ("the views", layout["views"], pairs.views),
            (
                "the ways to see an image (place of the crop, mirrored: data.crops and data.flip)",
                [tuple(way) for way in layout["data.crops and data.flip (place, mirrored)"]],
                pairs.ways,
            ),
        ):
            if lacking := [each for each in ours if each not in there]:
                raise CacheError(
                    f"{folder} has {what} {there}, and this run needs {lacking}. {again}"
                )
        for what, count in (("pairs", len(pairs)), ("prompts", len(pairs.prompts))):
            if layout[what] != count:
                raise CacheError(
                    f"{folder} has {layout[what]:,} {what}, and this run has {count:,}. {again}"
                )
        reader.check(
            [
                *_names("prompts", layout["prompts"], layout["prompts_per_shard"]),
                *_names("pairs", layout["pairs"], layout["pairs_per_shard"]),
            ]
        )
        return cls(reader, layout, pairs, half=layout["model.posterior"] != posterior)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}  # each worker maps the files itself

    def pair(self, number: int) -> CachedPair | Skipped:
        position = int(np.searchsorted(self._numbers, number))
        try:
            shard, row = self._shard("pairs", position)
            entry = shard.metadata["pairs"][row]
        except CacheError as error:
            return Skipped(sample_id=f"pair {number}", reason=SkipReason.DAMAGED, detail=str(error))
        if "reason" in entry:
            return Skipped(**{**entry, "reason": SkipReason(entry["reason"])})
        parts = {part: float(values[position]) for part, values in self._strengths.items()}
        return CachedPair(self, str(position), shard, entry, Strength(**parts))

    def _shard(self, what: str, position: int) -> tuple[_MappedShard, int]:
        """The shard of a pair or a caption, and its place there."""
        per_shard = self._layout[f"{what}_per_shard"]
        name = f"{what}-{position // per_shard * per_shard:08d}.safetensors"
        if name not in self._opened:
            self._opened[name] = _MappedShard(self._reader.open(name))
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(name)
        return self._opened[name], position % per_shard

    def image(self, shard: _MappedShard, name: str, view: str, way: int) -> Tensor:
        """What the autoencoder made of an image."""
        return shard.tensor(name)[self._views.index(view), way]

    def prompt(self, number: int) -> tuple[EncodedPrompt, int]:
        """What the text encoders made of a caption, and its checksum."""
        shard, row = self._shard("prompts", number)
        rows = {name: shard.tensor(name)[row] for name in shard.names}
        return EncodedPrompt(number=number, rows=rows), shard.metadata["checksums"][row]


class _MappedShard:
    """A shard whose tensors, views of the mapped file, are made once."""

    def __init__(self, shard: OpenShard) -> None:
        self.path, self.metadata, self.names = shard.path, shard.metadata, sorted(shard.names)
        self._shard = shard
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, of which nothing is read before it is used."""
        if name not in self._tensors:
            self._tensors[name] = self._shard.tensor(name)
        return self._tensors[name]


class CachedPair:
    """A pair of a shard."""

    def __init__(
        self,
        pairs: CachedPairs,
        name: str,
        shard: _MappedShard,
        entry: Mapping[str, Any],
        strength: Strength,
    ) -> None:
        self.sample_id: str = entry["sample_id"]
        self.prompt: str = entry["caption"]
        self.strength = strength
        self._pairs, self._name, self._shard, self._entry = pairs, name, shard, entry

    def image(self, view: str, way: Way) -> CutImage | Skipped:
        place = self._entry["ways"].index(list(way))
        height, width, top, left, checksum = self._entry["views"][view][place]
        try:
            encoded = self._pairs.image(self._shard, self._name, view, place)
        except CacheError as error:
            return self._damaged(str(error), view)
        if _checksum(encoded) != checksum:
            return self._damaged(f"{self._shard.path} is not as it was written", view)
        if self._pairs.half:
            encoded = encoded[: len(encoded) // 2]
        return CutImage(pixels=encoded, original_size=(height, width), corner=(top, left))

    def embeddings(self, *, dropped: bool) -> EncodedPrompt | Skipped:
        try:
            prompt, checksum = self._pairs.prompt(0 if dropped else self._entry["prompt"])
        except CacheError as error:
            return self._damaged(str(error), None)
        if _checksum(*(prompt.rows[name] for name in sorted(prompt.rows))) != checksum:
            return self._damaged("its caption's encoding is not as it was written", None)
        return prompt

    def _damaged(self, detail: str, view: str | None) -> Skipped:
        return Skipped(
            sample_id=self.sample_id,
            reason=SkipReason.DAMAGED,
            detail=f"{detail}: have it computed again by the same diffalign precompute as before",
            side=view,
        )
