"""What a run's frozen encoders make of its image pairs: computed in advance, and used again."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffalign import components
from diffalign.blocks import AbstractPlan, Block, Do, Failed, Row, digest
from diffalign.cache.encodings import (
    CachedPairs,
    EncodingShapes,
    EncodingsLayout,
    EncodingsWriter,
    is_of_pairs,
    unusable_in,
)
from diffalign.cache.shards import check_room
from diffalign.data.decoding import Size
from diffalign.data.pairs.encoded import DecodedPair, PairsToEncode
from diffalign.data.pairs.samples import unit_range
from diffalign.data.skipping import SkipLog, Skipped
from diffalign.errors import ConfigError, ModelError
from diffalign.models.devices import DTYPES, choose_device
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.loading import FrozenEncoders, load_encoders
from diffalign.training.config import RunConfig

PROMPTS_AT_ONCE = 16
_LESS = "model.posterior mean halves images, data.flip false as well, model.vae_dtype bf16 too"
"""How encodings take less."""


def folder_of(run: RunConfig) -> Path:
    """Where the encodings of a run lie."""
    return run.encodings_cache or run.output / "cache/encodings"


def check_encodings(run: RunConfig) -> None:
    """Raise ConfigError where a run whose encoders are not loaded would need them, or where what
    they make cannot be known in advance."""
    if not run.model.takes_encodings:
        return
    resident = "Set model.encoders to resident"
    data = run.data
    if data is None or run.responses is not None or run.rollouts is not None:
        raise ConfigError(
            f"model.encoders is cached, which image pairs of a data set can be, and batches come "
            f"from {run.section.origin}. {resident}"
        )
    if not run.likelihood.takes_encodings:
        raise ConfigError(
            f"model.encoders is cached, and the likelihood {components.kind_of(run.likelihood)} "
            f"needs the encoders while the model trains. {resident}, or choose denoising"
        )
    if run.previews is not None:
        raise ConfigError(
            "model.encoders is cached, and previews are sampled with autoencoder and text encoders "
            f"while the model trains. {resident}, or remove previews, and sample from the run's "
            "checkpoints with diffalign generate"
        )
    if data.streaming:
        raise ConfigError(
            "model.encoders is cached, and data.streaming is true: of a stream nothing is computed "
            f"in advance. Set data.streaming to false. Or: {resident.lower()}"
        )
    if data.scores.tag is not None:
        raise ConfigError(
            "model.encoders is cached, and data.scores.tag gives each image of a pair a prompt of "
            f"its own, where captions are encoded in advance. {resident}, or leave tag out"
        )
    if data.crop == "random" and data.crops is None:
        raise ConfigError(
            "model.encoders is cached, and data.crop is random: anywhere is too many places to be "
            "encoded in advance. Set data.crops to a number of places, such as 4, or data.crop to "
            "center"
        )


def fingerprint(run: RunConfig, pairs: PairsToEncode) -> Mapping[str, Any]:
    """All that the encodings of a run depend on, and nothing else: another network, adapter,
    objective or seed may use them."""
    model = cast(AbstractDiffusion, run.model)
    return {
        "model.kind": components.kind_of(model),
        "model.vae_dtype": model.vae_dtype,
        "model.vae_tiling": model.vae_tiling,
        **model.parts.encoder_identities(),
        "training.precision": run.training.precision,
        **pairs.fingerprint(),
    }


def open_encodings(run: RunConfig, pairs: PairsToEncode) -> CachedPairs:
    """The encodings that were computed for a run, or for one that agrees in all they depend on.

    Raises:
        CacheError: see `CachedPairs.open`.
    """
    posterior = cast(AbstractDiffusion, run.model).posterior
    return CachedPairs.open(folder_of(run), pairs, fingerprint(run, pairs), posterior=posterior)


def check_encodable(run: RunConfig) -> AbstractDiffusion:
    """The model with its encoders.

    Raises:
        ConfigError: it has none whose work could be done in advance.
        ModelError: they are not there.
    """
    if run.model.makes != "images":
        raise ConfigError(
            f"model.kind {components.kind_of(run.model)} has no encoders whose work could be done "
            f"in advance: those of diffusion models, such as sdxl, are computed before a run"
        )
    check_encodings(
        dataclasses.replace(run, model=_with(cast(AbstractDiffusion, run.model), "cached"))
    )
    model = _with(cast(AbstractDiffusion, run.model), "resident")
    model.check_to_sample()
    return model


def _with(model: AbstractDiffusion, encoders: Any) -> AbstractDiffusion:
    return dataclasses.replace(model, encoders=encoders)


class EncodingsPlan(AbstractPlan):
    """The encodings of a run, as blocks: a file each."""

    title, unit = "encodings", "images and captions"
    is_result = True

    def __init__(
        self, run: RunConfig, pairs: PairsToEncode, encoders: FrozenEncoders | EncodingShapes
    ) -> None:
        """Begin, or go on with what was started.

        Args:
            run: the config.
            pairs: of its data.
            encoders: loaded, or what they make: then each worker loads its own.

        Raises:
            CacheError: the folder holds encodings of other settings.
        """
        self._run, self._model = run, check_encodable(run)
        self._encoders: FrozenEncoders | None = None
        if isinstance(encoders, EncodingShapes):
            shapes = encoders
        else:
            self._encoders, shapes = encoders, shapes_of(self._model, encoders)
        self.folder, self.layout = folder_of(run), EncodingsLayout(pairs, shapes)
        self.writer = EncodingsWriter(self.folder, self.layout, fingerprint(run, pairs))
        self._skips = SkipLog(None)
        identity = digest([fingerprint(run, pairs), self.layout.plain()])
        self.blocks = [
            Block.of(place, [identity, name], len(self.layout.positions(name)), name)
            for place, name in enumerate(self.layout.shards)
        ]

    def file(self, block: Block) -> Path:
        return self.folder / block.work

    def is_done(self, block: Block) -> bool:
        return False  # its file alone says so

    def is_kept(self, block: Block) -> bool:
        return self.writer.is_whole(block.work)

    def write(self, block: Block, made: Sequence[Row | Failed]) -> None:
        assert not made  # it is written

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert not rows  # the files are the result

    def check_room(self, blocks: Sequence[Block]) -> None:
        """Raise CacheError unless the disk has room for some of the files."""
        needed = self.layout.bytes_of([block.work for block in blocks])
        check_room(self.folder, needed, less=_LESS)

    def unusable(self, blocks: Sequence[Block]) -> Counter[str]:
        """Why pairs of some of the files cannot be used, and how many."""
        names = [block.work for block in blocks if is_of_pairs(block.work)]
        return unusable_in(self.writer, names)

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        encoders = self._encoders or load(self._run, choose_device(device or "auto"))
        names = [block.work for block in upcoming if is_of_pairs(block.work)]
        places = [place for name in names for place in self.layout.positions(name)]
        following = iter(names)
        decoded = self.layout.pairs.decoded(places) if places else iter(())

        def do(block: Block) -> list[Row | Failed]:
            if not is_of_pairs(block.work):
                _compute_prompts(self.writer, encoders, block.work)
            elif next(following, None) == block.work:
                self._compute_pairs(encoders, block.work, decoded)
            else:  # nobody knew that it would be asked for
                own = self.layout.pairs.decoded(list(self.layout.positions(block.work)))
                self._compute_pairs(encoders, block.work, own)
            return []

        return do

    def _compute_pairs(
        self,
        encoders: FrozenEncoders,
        shard: str,
        decoded: Iterator[DecodedPair | Skipped],
    ) -> None:
        pairs = self.layout.pairs
        found = _encoded(encoders, self.layout, decoded, len(self.layout.positions(shard)))
        for each in found:
            if isinstance(each, Skipped):
                self._skips.add(each)
        self._skips.stop_above(pairs.config.max_bad_fraction, out_of=len(pairs))
        if reason := encoders.autoencoder.blame():
            raise ModelError(reason)
        self.writer.write_pairs(shard, found)


def load(run: RunConfig, device: torch.device) -> FrozenEncoders:
    """The encoders of a run."""
    model = check_encodable(run)
    return load_encoders(
        model.parts,
        model.encoder_settings(),
        conditioner=model.conditioner,
        device=device,
        compute_dtype=DTYPES[run.training.precision],
    )


def shapes_of(model: AbstractDiffusion, encoders: FrozenEncoders) -> EncodingShapes:
    """What encoders make of one image and of one caption."""
    prompt = _by_name(encoders, [""])
    channels = model.parts.latent_space().channels
    return EncodingShapes(
        factor=encoders.autoencoder.factor,
        posterior=model.posterior,
        channels=channels * (2 if model.posterior == "full" else 1),
        latent_dtype=DTYPES[model.vae_dtype],
        prompt={name: tuple(rows.shape[1:]) for name, rows in prompt.items()},
        prompt_dtype=next(iter(prompt.values())).dtype,
    )


def _by_name(encoders: FrozenEncoders, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Name -> [n, ...], what the text encoders make of n distinct captions, on the CPU."""
    found = encoders.prompts.encode(prompts)
    parts = {"hidden_states": found.hidden_states, "pooled": found.pooled}
    return {name: part.cpu() for name, part in parts.items() if part is not None}


def _compute_prompts(writer: EncodingsWriter, encoders: FrozenEncoders, shard: str) -> None:
    prompts, places = list(writer.layout.pairs.prompts), writer.layout.positions(shard)
    parts = defaultdict[str, list[Tensor]](list)
    # The same company for a caption whoever computes it: the same bytes of any worker.
    for start in range(places.start, places.stop, PROMPTS_AT_ONCE):
        texts = prompts[start : min(start + PROMPTS_AT_ONCE, places.stop)]
        for name, rows in _by_name(encoders, texts).items():
            parts[name].append(rows)
    writer.write_prompts(shard, {name: torch.cat(rows) for name, rows in parts.items()})


def _encoded(
    encoders: FrozenEncoders,
    layout: EncodingsLayout,
    decoded: Iterator[DecodedPair | Skipped],
    count: int,
) -> list[tuple[DecodedPair, Tensor] | Skipped]:
    """The next pairs with the encodings of their images, encoded as many at once as is allowed, and
    always next to the same others."""
    shapes, waiting = layout.shapes, defaultdict[Size, list[tuple[Tensor, Tensor]]](list)

    def encode(size: Size) -> None:
        places, pixels = zip(*waiting.pop(size), strict=True)
        posteriors = encoders.autoencoder.posterior(unit_range(torch.stack(pixels))).cpu()
        for place, posterior in zip(places, posteriors, strict=True):
            place.copy_(posterior)

    found: list[tuple[DecodedPair, Tensor] | Skipped] = []
    for _ in range(count):
        pair = next(decoded)
        if isinstance(pair, Skipped):
            found.append(pair)
            continue
        views = [list(images.values()) for images in pair.images.values()]
        size: Size = (views[0][0].pixels.shape[-2], views[0][0].pixels.shape[-1])
        latent = [shapes.channels, *(side // shapes.factor for side in size)]
        made = torch.empty([len(views), len(views[0]), *latent], dtype=shapes.latent_dtype)
        found.append((pair, made))
        for view, images in enumerate(views):
            for way, image in enumerate(images):
                waiting[size].append((made[view, way], image.pixels))
                if len(waiting[size]) == encoders.autoencoder.images_at_once:
                    encode(size)
    for size in list(waiting):
        encode(size)
    return found
