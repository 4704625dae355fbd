"""How well a denoiser predicts what was mixed into an image: a surrogate for its log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config import to_dict
from diffalign.data.batches import ImageBatch
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.diffusion.conditioning import conditioning_rows
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.inversion import Inversion, inverted, noise_within
from diffalign.models.diffusion.model import DiffusionModel
from diffalign.models.diffusion.noising import AbstractVariancePreserving, StraightPath
from diffalign.objectives.base import Measure, Measured
from diffalign.ranges import Between
from diffalign.seeding import derive_seed, noise_from_seeds
from diffalign.shapes import check_same_shape
from diffalign.timesteps import TimestepSampling


def denoising_log_likelihood(prediction: Tensor, target: Tensor) -> Tensor:
    """Surrogate for log p(image | prompt) at one noise level: minus half the mean squared error.

    The number of pixels, the number of timesteps and the timestep weight are all absorbed by beta;
    on this scale the launchers of DiffusionDPO set beta to 5000.

    Args:
        prediction: network output, shape [B, ...], any float type.
        target: what it was asked to predict (noise, velocity, flow), same shape.

    Returns:
        Shape [B], float32 (float64 for float64 inputs): policy and reference differ by less than
        half precision can hold.

    Raises:
        ValueError: the shapes differ; broadcasting would hide it.

    Source: Wallace et al. 2023, arXiv:2311.12908; their train.py folds the half into scale_term.
    """
    error = _difference(prediction, target).square()
    return -0.5 * error.flatten(start_dim=1).mean(dim=1)


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    """Prediction minus target, or minus another prediction, same shape, in at least float32."""
    check_same_shape(prediction=prediction, target=target)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype) - target.to(dtype)


def rejected_share(chosen_error: Tensor, overlap: Tensor, *, mu: float) -> Tensor:
    """Share of the rejected side's gradient at which a step still lowers the chosen side's error.

    To first order, and in the space of predictions. With g the gradients of the two sides' mean
    errors it is (1 - mu) |g_chosen|^2 / <g_chosen, g_rejected>, at most 1, and 1 where the two do
    not point the same way. What the loss multiplies them by does not enter.

    Args:
        chosen_error: mean squared error of the chosen rows, shape [B].
        overlap: mean product of both sides' residuals, shape [B].
        mu: how much of that room is left unused, 0 to 1.

    Returns:
        A scalar from 0 to 1, without gradient: one for all rows, whatever their timesteps.

    Source: Fu et al. 2025, arXiv:2511.03317, as in AIDC-AI/Diffusion-SDPO. Its 1e-9 in the
    denominator is left out: it is absolute, next to products of gradients that shrink with the
    square of the number of elements, and takes 15 % off for late timesteps and large batches.
    """
    own, shared = chosen_error.detach().mean(), overlap.detach().mean()
    return torch.where(shared > 0, ((1 - mu) * own / shared).clamp(0, 1), 1.0)


MISMATCHED = "mismatched"
"""View of all images of a batch next to the prompt of the next sample."""


@dataclass(kw_only=True)
class NoisyViews:
    """V views of B samples as V * B rows, corrupted; the rows of a view are consecutive."""

    views: tuple[str, ...]
    noisy: Tensor
    """Shape [V * B, channels, h, w], float32."""
    target: Tensor
    """What the network should predict, same shape."""
    time: Tensor
    """As the network takes it, shape [V * B]."""
    conditioning: Mapping[str, Any]
    """What else the network is told."""
    other_prompts: Mapping[str, Any] | None = None
    """The same with the prompt of the next sample, where the view `mismatched` is asked for."""
    metadata: Mapping[str, Tensor] = field(default_factory=dict)
    """Fields of `Likelihoods` that are the same for all views of a sample, [B]."""
    overlap: Tensor | None = None
    """Of chosen and rejected residuals, [B], once the policy was evaluated with gradient."""
    reference_prediction: Tensor | None = None
    """Shape of `target`, once the reference was evaluated, where a distance is asked for."""
    distance: Mapping[str, Tensor] = field(default_factory=dict)
    """View -> of the policy's prediction from that, [B], once the policy was evaluated."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """For the log, from then on."""


@dataclass(frozen=True, kw_only=True)
class Denoising(AbstractLikelihood[DiffusionModel, ImageBatch, NoisyViews]):
    """Minus half the denoising error at the time and noise that the batch carries."""

    batch_type: ClassVar[type] = ImageBatch
    measures: ClassVar[Measure] = "denoising error"
    takes_encodings: ClassVar[bool] = True

    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    """Which times the loader samples."""
    safeguard: Annotated[float, Between(0, 1)] | None = None
    """Scale the rejected side's gradient down where it would raise the chosen side's error: mu of
    Diffusion-SDPO, 0.9 there; null leaves it. Values do not change. There is one scale for each
    micro-batch of each device, logged as `safeguard_lambda`: it mixes timesteps, and depends on
    training.samples_per_device, but on neither accumulation nor processes."""

    inversion: Inversion | None = None
    """Mix images with the noise that the model itself would make them from, as InPO and SmPO do, in
    place of random noise; each image then has its own. `timesteps` are those of its steps."""
    distance: bool = False
    """Measure how far the policy's prediction is from the reference's as well, for objectives such
    as dspo. The reference then runs in every step."""
    embedding: Literal["none", "prompts", "images"] = "none"
    """Say what each sample is about, for the objective diffusion_rpo: by the mean of its prompt's
    hidden states over tokens, less the mean of the micro-batch; or by the latents of its chosen
    image, likewise, which tell layouts and colours and not what is shown."""
    mismatched: bool = False
    """Measure every image next to the prompt of the next sample too, without gradient, for the
    baseline `mismatched` of the objective kto: half as much time again."""
    snr_bias: float | None = None
    """Let a pair count by sigmoid(bias - log of the signal-to-noise ratio) of its time, so that
    noisy times count more, as in CaPO (arXiv:2502.02588); null lets all times count alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = TimestepSampling(strata=self.timesteps.strata)
        if self.inversion is not None and self.timesteps != allowed:
            raise ValueError(
                "inversion walks to times of its own, and timesteps says others: leave all of "
                "timesteps but strata out"
            )

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, AbstractDiffusion):
            raise ValueError("denoising measures images under a diffusion model, such as sdxl")
        noising = model.noising()
        if self.inversion is not None:
            self.inversion.check(noising)
        self.timesteps.check(noising.schedule_length)
        if self.timesteps.moves and not isinstance(noising, StraightPath):
            raise ValueError(
                "timesteps are shifted, which only those of a straight path can be (SD3 and other "
                "FlowMatch models), and this model has a beta schedule: leave shift out"
            )

    def timestep_sampling(self) -> TimestepSampling:
        if self.inversion is None:
            return self.timesteps
        return replace(self.timesteps, values=self.inversion.times)

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """The views themselves, but for `mismatched`, which is made here.

        Raises:
            ValueError: there is a safeguard, and no pair for it; or `mismatched`, and nobody reads
                it.
        """
        if self.safeguard is not None and not views >= {"chosen", "rejected"}:
            raise ValueError(
                f"safeguard is {self.safeguard:g}, and the objective does not compare chosen with "
                f"rejected images (it reads {', '.join(sorted(views))}): set safeguard to null"
            )
        if not self.mismatched:
            return views
        if MISMATCHED not in views:
            raise ValueError(
                "mismatched is true, and the objective does not read that view: set it to false, "
                "or take kto with baseline mismatched"
            )
        return views - {MISMATCHED}

    @property
    def least_samples(self) -> int:
        return 2 if self.mismatched else 1

    @property
    def walks(self) -> bool:
        return self.inversion is not None

    @property
    def runs_reference(self) -> bool:
        return self.inversion is not None and self.inversion.by == "reference"

    @property
    def weighs_rows(self) -> bool:
        return self.snr_bias is not None

    @property
    def gives_measured(self) -> frozenset[Measured]:
        given: dict[Measured, bool] = {
            "distance": self.distance,
            "embedding": self.embedding != "none",
        }
        return frozenset(name for name, is_given in given.items() if is_given)

    def check_known_in_advance(self, views: frozenset[str]) -> None:
        """Two numbers a pair, its two errors, are all that an objective asks of a reference.

        Raises:
            ValueError: it asks for more.
        """
        if self.distance:
            raise ValueError(
                "likelihood.distance compares predictions of policy and reference, for which one "
                "number an image is not enough"
            )
        if self.inversion is not None:
            raise ValueError(
                "likelihood.inversion lets the model find the noise of an image in every step, and "
                "so it is there anyway"
            )
        if self.mismatched:
            raise ValueError(
                "likelihood.mismatched measures images next to the prompts of other samples, which "
                "are others in every batch"
            )

    def defining_settings(self) -> Mapping[str, Any]:
        times = to_dict(self.timesteps)
        return {f"timesteps.{name}": value for name, value in times.items()}

    def noise(self, model: DiffusionModel, batch: ImageBatch) -> Tensor:
        return batch.timesteps / model.noising.schedule_length

    @torch.no_grad()
    def prepare(self, model: DiffusionModel, batch: ImageBatch) -> NoisyViews:
        """Encode and corrupt all views; the views of a sample share time and prompt, and noise
        unless it is inverted."""
        views = batch.views
        clean = model.latents(batch)
        t = batch.timesteps.repeat(len(views))
        conditioning = model.conditioning(batch)
        if self.inversion is None:
            one_view = noise_from_seeds(batch.noise_seeds, tuple(clean.shape[1:]))
            noise = send(one_view, clean.device).repeat(len(views), 1, 1, 1)
        else:
            noise = _inverted_noise(model, batch, clean, t.long(), conditioning, self.inversion)
        return NoisyViews(
            views=views,
            noisy=model.noising.corrupt(clean, noise, t),
            target=model.noising.target(clean, noise, t),
            time=send(model.noising.network_time(t), clean.device),
            conditioning=conditioning,
            other_prompts=model.conditioning(_next_prompts(batch)) if self.mismatched else None,
            metadata=self._metadata(model, batch, clean, conditioning),
        )

    def _metadata(
        self,
        model: DiffusionModel,
        batch: ImageBatch,
        clean: Tensor,
        conditioning: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        known: dict[str, Tensor] = {}
        if self.embedding == "prompts":
            known["embedding"] = conditioning["encoder_hidden_states"][: len(batch)].mean(dim=1)
        elif self.embedding == "images":
            rows = batch.views.index("chosen") * len(batch) + torch.arange(len(batch))
            known["embedding"] = clean[send(rows, clean.device)].flatten(start_dim=1)
        if "embedding" in known:
            about = known["embedding"].float()
            known["embedding"] = about - about.mean(dim=0) if len(about) > 1 else about
        if self.snr_bias is not None:
            weight = torch.sigmoid(self.snr_bias - model.noising.log_snr(batch.timesteps)).float()
            of_pairs = batch.strength.get("weight")
            weight = weight if of_pairs is None else weight * of_pairs
            known["weight"] = send(weight, clean.device)
        return known

    def evaluate(self, model: DiffusionModel, prepared: NoisyViews) -> dict[str, Tensor]:
        mismatched: dict[str, Tensor] = {}
        if prepared.other_prompts is not None:
            with torch.no_grad():
                other = model.predict(prepared.noisy, prepared.time, prepared.other_prompts)
                mismatched[MISMATCHED] = denoising_log_likelihood(other, prepared.target)
        prediction = model.predict(prepared.noisy, prepared.time, prepared.conditioning)
        rows = denoising_log_likelihood(prediction, prepared.target)
        views = dict(zip(prepared.views, rows.chunk(len(prepared.views)), strict=True))
        if self.distance:
            self._compare(model, prediction, prepared)
        if torch.is_grad_enabled() and {"chosen", "rejected"} <= views.keys():
            self._compare_sides(views, prediction.detach(), prepared)
            if self.safeguard is not None:
                views["rejected"] = self._guarded(views, prepared, self.safeguard)
        return {**views, **mismatched}

    def _compare(self, model: DiffusionModel, prediction: Tensor, prepared: NoisyViews) -> None:
        """Keep what the reference predicted, or measure how far from it the policy's is."""
        if model.is_reference:
            prepared.reference_prediction = prediction.detach()
        elif prepared.reference_prediction is not None:
            apart = _difference(prediction, prepared.reference_prediction).square()
            rows = apart.flatten(start_dim=1).mean(dim=1)
            prepared.distance = dict(
                zip(prepared.views, rows.chunk(len(prepared.views)), strict=True)
            )

    def _compare_sides(
        self, views: Mapping[str, Tensor], prediction: Tensor, prepared: NoisyViews
    ) -> None:
        """Keep how far both sides' residuals point the same way."""
        residuals = _difference(prediction, prepared.target).chunk(len(prepared.views))
        of = dict(zip(prepared.views, residuals, strict=True))
        overlap = (of["chosen"] * of["rejected"]).flatten(start_dim=1).mean(dim=1)
        norms = (4 * views["chosen"].detach() * views["rejected"].detach()).sqrt()
        smallest = torch.finfo(norms.dtype).tiny
        prepared.overlap = overlap
        prepared.figures = {"cosine_of_sides": overlap / norms.clamp(min=smallest)}

    def _guarded(self, views: Mapping[str, Tensor], prepared: NoisyViews, mu: float) -> Tensor:
        """The rejected rows as they are, with a share of their gradient."""
        assert prepared.overlap is not None, "the sides were compared"
        share = rejected_share(-2 * views["chosen"].detach(), prepared.overlap, mu=mu)
        prepared.figures = {**prepared.figures, "safeguard_lambda": share}
        rejected = views["rejected"]
        return rejected.detach() + share * (rejected - rejected.detach())

    def row_metadata(self, prepared: NoisyViews) -> Mapping[str, Mapping[str, Tensor]]:
        known = {view: dict(prepared.metadata) for view in prepared.views}
        if prepared.overlap is not None:
            for side in ("chosen", "rejected"):
                known[side]["overlap"] = prepared.overlap
        for view, distance in prepared.distance.items():
            known[view]["distance"] = distance
        return {view: fields for view, fields in known.items() if fields}

    def figures(self, prepared: NoisyViews) -> Mapping[str, Tensor]:
        return prepared.figures

    def published_scale(self, beta: float) -> str:
        """Beta in the units of published code, for the start of a run."""
        return f" (Salesforce beta_dpo {beta:g}, diffusers SD1.5 script beta_dpo {beta / 2:g})"

    def describe(self) -> str:
        """One line for the start of a run."""
        said = ["minus half the mean squared denoising error"]
        if self.inversion is not None:
            walk = self.inversion
            said.append(
                f"under noise that the {walk.by} finds in {walk.steps} "
                f"{'refined ' if walk.refined else ''}steps"
            )
        if self.safeguard is not None:
            said.append(f"the rejected side's gradient is held back (safeguard {self.safeguard:g})")
        if self.snr_bias is not None:
            said.append(f"pairs count by sigmoid({self.snr_bias:g} - log SNR) of their time")
        return "; ".join(said)


def _next_prompts(batch: ImageBatch) -> ImageBatch:
    """A batch whose samples have the prompt of the next one each."""
    encodings = batch.encodings
    if encodings is not None:
        encodings = replace(encodings, prompt_rows=encodings.prompt_rows.roll(-1))
    return replace(batch, prompts=(*batch.prompts[1:], *batch.prompts[:1]), encodings=encodings)


def _inverted_noise(
    model: DiffusionModel,
    batch: ImageBatch,
    clean: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Any],
    inversion: Inversion,
) -> Tensor:
    """The noise of every row, shape of `clean`: that of each image by itself."""
    noising = model.noising
    assert isinstance(noising, AbstractVariancePreserving), "check() was called"
    views, shape = len(batch.views), tuple(clean.shape[1:])

    def predict(latents: Tensor, times: Tensor, rows: Tensor) -> Tensor:
        time = send(noising.network_time(times), latents.device)
        return model.predict(latents, time, conditioning_rows(conditioning, rows))

    def added(step: int) -> Tensor:
        seeds = [derive_seed(seed, "inversion", step) for seed in batch.noise_seeds]
        return noise_from_seeds(seeds, shape).repeat(views, 1, 1, 1)

    which = model.reference() if inversion.by == "reference" else nullcontext()
    with which, model.sampling():
        latents = inverted(
            clean,
            t,
            predict,
            noising,
            times=inversion.times,
            refined=inversion.refined,
            eta=inversion.eta,
            added=added,
        )
    return noise_within(latents, clean, t, noising)
