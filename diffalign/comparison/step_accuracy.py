"""Agreement of scorers with known preferences, by the noise level of the images.

A preference model for trajectories is asked about half-denoised images. Pairs with known labels
are noised at a timestep, chosen and rejected with the same noise, and predicted clean in one step
of the diffusion model; the scorer is right where the prediction of the chosen image scores higher.

Source: the validation of RockeyCoss/SPO, trainer/tasks/spm_task.py, with its timesteps; there the
images of timestep 0 are the clean ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice

import torch
from torch import Tensor

from diffalign.comparison.compare import Place
from diffalign.data.batches import ImageBatch
from diffalign.data.pairs.columns import PAIR_VIEWS, ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.samples import Sample, SampleMaker, stack, with_unit_range
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.reverse import through_one_step
from diffalign.scorers.base import AbstractScorer
from diffalign.timesteps import TimestepSampling

AUTHORS_TIMESTEPS = (0, 251, 501, 701, 951)


Agreement = dict[Place, float]
"""For every pair, by its prompt and number: 1 where the chosen image scored higher, 0 where the
rejected one did, one half where they scored equal. Two of them go into `compare_scores`."""


def accuracy_by_timestep(
    scorers: Mapping[str, AbstractScorer],
    model: DiffusionModel,
    batches: Iterable[ImageBatch],
    *,
    guidance: float,
    timesteps: Sequence[int] = AUTHORS_TIMESTEPS,
) -> dict[str, dict[int, Agreement]]:
    """Ask every scorer about the same half-denoised pairs.

    Args:
        scorers: by any name; those that take a timestep are told it, the others are not.
        model: whose one-step predictions are scored.
        batches: decided pairs, such as `decided_pairs` gives; at least one.
        guidance: of the predictions.
        timesteps: noise levels; timestep 0 means the clean images themselves.

    Returns:
        {name: {timestep: agreement with all pairs}}.
    """
    found: dict[str, dict[int, Agreement]] = {
        name: {timestep: {} for timestep in timesteps} for name in scorers
    }
    seen = 0
    for batch in batches:
        places = list(zip(batch.captions, count(seen), strict=False))
        seen += len(batch)
        for timestep in timesteps:
            t = torch.full((2 * len(batch),), float(timestep))
            images = _half_denoised(model, batch, t, guidance=guidance)
            for name, scorer in scorers.items():
                time = t.to(images.device) if scorer.takes_time else None
                chosen, rejected = scorer.score(images, batch.captions * 2, time).chunk(2)
                right = ((chosen - rejected).sign() + 1) / 2
                found[name][timestep].update(zip(places, right.tolist(), strict=True))
    return found


def _half_denoised(
    model: DiffusionModel, batch: ImageBatch, t: Tensor, *, guidance: float
) -> Tensor:
    """The chosen images, then the rejected ones."""
    images = torch.cat([batch.images[view] for view in PAIR_VIEWS])
    if not t.any():
        return images
    return through_one_step(
        model,
        images,
        batch.captions * 2,
        t,
        noise_seeds=batch.noise_seeds * 2,
        encoding_seeds=[seed for view in PAIR_VIEWS for seed in batch.encoding_seeds[view]],
        guidance=guidance,
    )


def decided_pairs(config: PairConfig, *, batch_size: int, seed: int = 0) -> Iterator[ImageBatch]:
    """Every usable pair of a data set once, in order; ties and unusable images are left out.

    Args:
        config: where the pairs lie; its `limit` counts pairs, and its `ties` must be `drop`.
        batch_size: pairs in a batch; the last one may be smaller.
        seed: of the noise with which they are seen.
    """
    maker = SampleMaker(
        config=config,
        views=PAIR_VIEWS,
        run_seed=seed,
        timesteps=TimestepSampling(),
        schedule_length=1,  # the sampled timestep is not used
    )
    size = (config.resolution, config.resolution)
    pairs = islice(open_data(config).pairs(), config.limit)
    made = (maker.make(pair, 0, size) for pair in pairs if isinstance(pair, ImagePair))
    samples = (sample for sample in made if isinstance(sample, Sample))
    while part := list(islice(samples, batch_size)):
        yield with_unit_range(stack(part))
