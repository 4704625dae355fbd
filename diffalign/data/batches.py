"""What a source hands to the loop. Every random choice of a row is a field of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageEncodings:
    """What frozen encoders made of the images and prompts of B samples, before the run."""

    size: tuple[int, int]
    """(height, width) of the images, pixels."""
    posteriors: Mapping[str, Tensor]
    """View -> [B, 2 * channels, h, w], means and standard deviations as the autoencoder gave them;
    or their means alone, [B, channels, h, w]."""
    prompts: Mapping[str, Tensor]
    """Name, such as `hidden_states` -> [P, ...], what the text encoders made of P prompts."""
    prompt_rows: Tensor
    """Int64 [B], which of the P prompts is that of each sample."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """B samples, each seen through one or more views (`chosen`, `rejected`) at one noise level.

    The views of a sample share timestep and noise, and as a rule the prompt; a view is what
    differs.
    """

    sample_ids: tuple[str, ...]
    """B of them."""
    prompts: tuple[str, ...]
    """B of them, after caption dropout: decided once per sample, `""` where dropped."""
    captions: tuple[str, ...]
    """B of them, before it: what an image that is sampled for this row is asked to show."""
    images: Mapping[str, Tensor]
    """View -> float32 [B, 3, H, W] in [-1, 1]; empty where there are encodings."""
    original_sizes: Mapping[str, Tensor]
    """View -> int64 [B, 2], (height, width) of the file before any resize."""
    crop_corners: Mapping[str, Tensor]
    """View -> int64 [B, 2], (top, left) of the crop in the resized image."""
    timesteps: Tensor
    """Float64 [B], in [0, schedule length), in units of training timesteps."""
    noise_seeds: tuple[int, ...]
    """B of them; the seed of a row's diffusion noise, shared by its views."""
    encoding_seeds: Mapping[str, tuple[int, ...]]
    """View -> B seeds of the noise with which the autoencoder's posterior is sampled."""
    visits: tuple[int, ...] = ()
    """B of them, where the samples are of a data set: the number of the visit that all these random
    choices are those of, below `data.visits` where that is given."""
    strength: Mapping[str, Tensor] = field(default_factory=dict)
    """Part of a pair's strength (`preference`, `margin`, `target`, `weight`) -> float32 [B]; those
    that are absent nobody asked for. See `diffalign.data.strength`."""
    encodings: ImageEncodings | None = None
    """Of images and prompts, where they were computed in advance; None where the model encodes."""
    users: tuple[str, ...] = ()
    """B of them, who gave each verdict, where `data.users` names the column that says it."""
    own_prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """View -> B prompts, after caption dropout, where each view has its own, such as one that says
    how good its image is; empty where the views of a sample share `prompts`."""

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, in order."""
        return tuple(self.encoding_seeds)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, pixels."""
        if self.encodings is not None:
            return self.encodings.size
        height, width = self.images[self.views[0]].shape[-2:]
        return height, width

    def prompts_of(self, view: str) -> tuple[str, ...]:
        """The B prompts of a view."""
        return self.own_prompts.get(view, self.prompts)

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """B pairs of reverse steps of a sampler, each from a noisy latent to a less noisy one.

    Each state that steps leave from is held once: where both sides of a pair leave from the same
    latent, one forward of the network serves both.
    """

    sample_ids: tuple[str, ...]
    """B of them."""
    states: Tensor
    """Latents that steps leave from, float32 [U, channels, h, w], with B <= U <= views * B."""
    prompts: tuple[str, ...]
    """U of them."""
    t: Tensor
    """Int64 [U], the training timestep of each state."""
    t_next: Tensor
    """Int64 [U], the timestep that is stepped to."""
    state_rows: Mapping[str, Tensor]
    """View -> int64 [B], the rows of `states` that its steps leave from."""
    outcomes: Mapping[str, Tensor]
    """View -> float32 [B, channels, h, w], where the steps arrived."""
    strength: Mapping[str, Tensor] = field(default_factory=dict)
    """See `ImageBatch`."""

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """One response of each of B samples, after its conversation; right-padded to L tokens."""

    input_ids: Tensor
    """Int64 [B, L]; every image marker already is as often as the model wants it."""
    attention_mask: Tensor
    """Int64 [B, L], 0 where padded."""
    response_mask: Tensor
    """Bool [B, L], True for the tokens of the response and the end-of-sequence token after it."""
    further: Mapping[str, Tensor]
    """What else the processor gave per token, such as `mm_token_type_ids`; [B, L] each."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B conversations about images, each with one or more responses.

    A view (see `diffalign.views`) is a response next to images under a condition, its tokens
    counted by a weight map. Conditions keep the number of image tokens, so that rows of tokens and
    images combine freely.
    """

    sample_ids: tuple[str, ...]
    """B of them."""
    visits: tuple[int, ...]
    """B of them: which sample of its random conditions each sample shows."""
    views: frozenset[str]
    """Names of the views that this batch serves."""
    responses: Mapping[str, TokenRows]
    """Response -> its rows: B of them, or those that `rows` says."""
    image_inputs: Mapping[str | None, Mapping[str, Tensor]]
    """Condition (None: the images as they are) -> what the image processor gave for all images
    of the batch in reading order, such as `pixel_values`; empty where there is no image."""
    image_counts: Tensor
    """Int64 [B], images of each sample; 0 for text alone."""
    weights: Mapping[str, Tensor]
    """`response:weights` -> float32 [B, L], aligned with the rows of that response."""
    own_image_inputs: Mapping[tuple[str, str | None], Mapping[str, Tensor]] = field(
        default_factory=dict
    )
    """(Response, condition) -> the same for the rows of that response, where some of them are about
    other images than `images` has."""
    rows: Mapping[str, Tensor] | None = None
    """Response -> int64 [n], which samples it belongs to, in order, where each sample has one
    response; a response that none has is absent. None where all have all."""
    strength: Mapping[str, Tensor] = field(default_factory=dict)
    """See `ImageBatch`; of responses that were sampled, their `advantage`. Empty where each sample
    has one response of a data set."""
    old_log_probs: Mapping[str, Tensor] = field(default_factory=dict)
    """Response -> float32 [B, L], log-probability of each of its tokens under the policy that
    sampled it, aligned with its rows and 0 elsewhere; empty where the policy has not moved since,
    or nobody asks."""

    def images_of(self, response: str, condition: str | None) -> Mapping[str, Tensor]:
        """What the image processor gave for the rows of a response under a condition."""
        found = self.own_image_inputs.get((response, condition))
        return self.image_inputs[condition] if found is None else found

    def seen_in(self, views: frozenset[str]) -> TokenBatch:
        """It with some of its views alone."""
        return replace(self, views=views)

    def __len__(self) -> int:
        return len(self.sample_ids)
