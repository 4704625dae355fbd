"""Image pairs whose encodings are computed in advance: what is computed, and how it is asked for.

Of every pair each image is encoded as often as there are ways to see it: at each of the places that
a crop may have, mirrored and not. Pairs that are held out are seen in one way alone.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffalign.data.decoding import BadImageError, Size, decode
from diffalign.data.loader import ignore_interrupts
from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import OpenedPairs
from diffalign.data.pairs.transforms import CENTER, Cut, CutImage, cut, numbered_place
from diffalign.data.rows import AbstractRows
from diffalign.data.skipping import LeftOut, Skipped
from diffalign.data.strength.base import Strength

Way = tuple[int, bool]
"""A way to see an image: the number of the place that it is cut at, and whether it is mirrored."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """What the text encoders made of a caption."""

    number: int
    """Among all captions; equal captions share it."""
    rows: Mapping[str, Tensor]
    """Name -> its part, such as `hidden_states` [tokens, width]."""


class EncodedPair(Protocol):
    """A pair in place of an `ImagePair`."""

    sample_id: str
    prompt: str
    strength: Strength

    def image(self, view: str, way: Way) -> CutImage | Skipped:
        """One of its images as it was encoded, or why that cannot be used."""

    def embeddings(self, *, dropped: bool) -> EncodedPrompt | Skipped:
        """Its caption as it was encoded, or if that is dropped, the empty one."""


class AbstractEncodedPairs(abc.ABC):
    """The pairs of a data set as they were encoded; read by the loader's workers."""

    @abc.abstractmethod
    def pair(self, number: int) -> EncodedPair | Skipped:
        """One pair, by its number in the data set, or why it cannot be used."""


@dataclass(frozen=True, kw_only=True)
class PairsToEncode:
    """The pairs of a run, those that are held out among them."""

    data: OpenedPairs
    config: PairConfig
    views: tuple[str, ...]
    numbers: np.ndarray
    """Of the pairs in the data set, int64 [n], rising."""
    targets: Sequence[Size]
    """(height, width) that the images of each pair are cut to."""
    held_out: frozenset[int]
    """Numbers of those that are not trained on."""

    def __len__(self) -> int:
        return len(self.numbers)

    @functools.cached_property
    def ways(self) -> tuple[Way, ...]:
        """In which the images of a pair are seen that is trained on."""
        places = range(self.config.crops or 1) if self.config.crop == "random" else (CENTER,)
        mirrored = (False, True) if self.config.flip else (False,)
        return tuple((place, mirror) for place in places for mirror in mirrored)

    def ways_of(self, position: int) -> tuple[Way, ...]:
        """In which the images of the pair at a position of `numbers` are seen."""
        held_out = int(self.numbers[position]) in self.held_out
        return ((CENTER, False),) if held_out else self.ways

    @functools.cached_property
    def _light(self) -> tuple[list[str], str, dict[str, np.ndarray]]:
        """The caption of each pair, a digest of all that its row says next to images but numbers of
        `data.strength`, which no encoding depends on, and its strength by part."""
        assert isinstance(self.data.rows, AbstractRows)
        columns, wanted = self.data.columns, iter(self.numbers.tolist())
        digest, captions = hashlib.blake2b(digest_size=8), list[str]()
        strengths: dict[str, list[float]] = defaultdict(list)
        next_wanted = next(wanted, None)
        names = dataclasses.replace(columns, numbers={}).light()
        for number, row in enumerate(self.data.rows.scan(columns.light())):
            if next_wanted is None:
                break
            if number == next_wanted:
                values = [row.values.get(name) for name in names]
                if columns.scored is not None and columns.scored.config.filter is not None:
                    values.append(columns.chosen(row))  # which scores may have turned round
                digest.update(repr((number, columns.sample_id(row), values)).encode())
                captions.append(columns.caption(row))
                for part, value in columns.strength_of(row).parts().items():
                    strengths[part].append(value)
                next_wanted = next(wanted, None)
        arrays = {part: np.array(values) for part, values in strengths.items()}
        return captions, digest.hexdigest(), arrays

    @property
    def strengths(self) -> Mapping[str, np.ndarray]:
        """Parts of the pairs' strengths, float64 [n] each; see `Strength`."""
        return self._light[2]

    @functools.cached_property
    def prompts(self) -> Mapping[str, int]:
        """The distinct captions, each with its number; the empty one comes first."""
        return {text: number for number, text in enumerate(dict.fromkeys(["", *self._light[0]]))}

    def fingerprint(self) -> Mapping[str, Any]:
        """All of the data and its settings that encodings depend on, by key."""
        config = self.config
        settings: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("resolution", "buckets", "crop", "max_pixels", "limit", "columns")
        }
        settings |= {name: getattr(config, name) for name in ("labels", "ties", "weighting")}
        if config.group_pairs != "all":
            settings["group_pairs"] = config.group_pairs
        if config.annotators is not None:
            settings["annotators"] = config.annotators
        if config.crop == "random":
            settings["crops"] = config.crops
        if len(self.ways) > 1:
            settings["holdout"] = config.holdout
        return {
            **{f"data.{name}": value for name, value in settings.items()},
            "data (files, or id and revision)": self.data.fingerprint,
            "data (captions and preferences)": self._light[1],
        }

    def decoded(self, positions: Sequence[int]) -> Iterator[DecodedPair | Skipped]:
        """Pairs at these positions of `numbers`, in order, by worker processes."""
        return iter(
            DataLoader(
                _Decoder(self),
                batch_size=None,
                sampler=positions,
                num_workers=self.config.workers,
                worker_init_fn=ignore_interrupts,
            )
        )


OpensEncodings = Callable[[PairsToEncode], AbstractEncodedPairs]
"""Opens what was computed of the pairs of a run."""


@dataclass(frozen=True, kw_only=True)
class DecodedPair:
    """All that is to be encoded of one pair."""

    sample_id: str
    prompt: str
    images: Mapping[str, Mapping[Way, CutImage]]
    """View -> way -> the image, as uint8 [3, H, W]."""


@dataclass(frozen=True)
class _Decoder(Dataset):
    pairs: PairsToEncode

    def __getitem__(self, position: int) -> DecodedPair | Skipped:
        pairs = self.pairs
        assert isinstance(pairs.data.rows, AbstractRows)
        pair = pairs.data.read(pairs.data.rows[int(pairs.numbers[position])])
        assert not isinstance(pair, LeftOut), "the index holds pairs only"
        if isinstance(pair, Skipped):
            return pair
        images = {}
        for view in pairs.views:
            found = self._cuts(pair, view, position)
            if isinstance(found, Skipped):
                return found
            images[view] = found
        return DecodedPair(
            sample_id=pair.sample_id,
            prompt=pair.prompt,
            images=images,
        )

    def _cuts(self, pair: ImagePair, view: str, position: int) -> dict[Way, CutImage] | Skipped:
        pairs = self.pairs
        image = decoded_view(pair, view, max_pixels=pairs.config.max_pixels)
        if isinstance(image, Skipped):
            return image
        return {
            (number, mirrored): cut(
                image,
                Cut(
                    target=pairs.targets[position],
                    place=numbered_place(pair.sample_id, number, of=pairs.config.crops),
                    mirrored=mirrored,
                ),
            )
            for number, mirrored in pairs.ways_of(position)
        }


def decoded_view(pair: ImagePair, view: str, *, max_pixels: int) -> Any:
    """The image of a view, of Pillow, or why it cannot be used."""
    try:
        return decode(getattr(pair, view), max_pixels=max_pixels)
    except BadImageError as error:
        return Skipped(
            sample_id=pair.sample_id, reason=error.reason, detail=error.detail, side=view
        )
