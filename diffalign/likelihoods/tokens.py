"""Log-probability of responses about images, token by token.

A view is a response next to images under a condition, its tokens counted by a weight map. Whatever
the number of views and maps, a response next to one set of images goes through policy and
reference once each; and responses next to the same images and prompt are branches of one row, where
the model's family allows it.

Sources: Rafailov et al. 2023, arXiv:2305.18290 (DPO); Zeng et al. 2024, arXiv:2404.11999
(divergence); Gu et al. 2024, arXiv:2412.14487 (visual gain); Zhou et al. 2024, arXiv:2402.11411
(the response `own`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.data.batches import TokenBatch
from diffalign.errors import ModelError
from diffalign.likelihoods.base import AbstractLikelihood
from diffalign.likelihoods.token_rows import ForwardGroup, RowsOfBatch, TokensOfResponse
from diffalign.models.base import AbstractModel
from diffalign.models.devices import send
from diffalign.models.vlm.branches import packing_obstacle
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.token_scores import ResponseRows, States
from diffalign.objectives.base import Measure, Measured, TokenLikelihoods
from diffalign.views import View

Reduction = Literal["sum", "mean"]

_MEASURED: tuple[Measured, ...] = ("typicality", "tokens")

OWN = "own"
"""Response that no data set has: at each token of the chosen one, what the policy would have
written there next to disturbed images (POVID)."""
_CHOSEN = "chosen"
_REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True)
class VisualGain:
    """Weights of tokens by how much the images raise their probability (TPO).

    A weight c is 1/2 + sigmoid(s), and 3/2 - sigmoid(s) in a rejected response.
    """

    condition: str
    """What disturbs the images: a name under `responses.conditions`."""
    form: Literal["multiplied", "released"] = "multiplied"
    """`multiplied`: s is the difference of log-probabilities next to the images and next to
    disturbed ones, under the policy and without gradient, and a token's log-ratio counts c times.
    `released`, as the authors' code has it: s is the difference of raw logits, with gradient, and
    log c is added to the token's log-probability, by policy and reference each its own."""


def released_gain(clear: Tensor, disturbed: Tensor, *, rejected: bool) -> Tensor:
    """What is added to the log-probability of each token: log c of `VisualGain`.

    Args:
        clear: raw logits of tokens next to their images, any shape.
        disturbed: next to disturbed ones, the same shape.
        rejected: whether they are of a rejected response.

    Returns:
        The same shape, in (-log 2, log 1.5); with gradient.
    """
    gain = torch.sigmoid(clear - disturbed)
    return torch.log(1.5 - gain if rejected else 0.5 + gain)


@dataclass(frozen=True, kw_only=True)
class PreparedView:
    """How the numbers of a view are read off those of its group."""

    group: int
    """Of which run of the model."""
    target: int
    """Which of the tokens that are asked for at each position."""
    weights: Tensor
    """How much each token counts, float32 [B, L]; 0 outside the response."""
    rows: Tensor | None = None
    """Int64 [B], which samples these are, where some have another response."""
    old: Tensor | None = None
    """Log-probability of each token when it was sampled, float32 [B, L]; None where the policy has
    not moved since, or nobody asks."""
    disturbed: int | None = None
    """Of which run of the model the logits next to disturbed images are, for a gain as released."""
    rejected: bool = False
    """Whether it is of the rejected response, where a gain asks."""


@dataclass(kw_only=True)
class PreparedTokens:
    """A `TokenBatch` on the device; policy and reference leave here what is more than a number."""

    groups: Sequence[ResponseRows]
    """What goes through the model together."""
    tokens: Sequence[TokensOfResponse]
    """Of every group, in the order of the groups."""
    views: Mapping[str, PreparedView]
    empty: frozenset[str]
    """Views that no sample of this batch has."""
    device: torch.device
    reference_states: list[States] | None = None
    """Of every group, once the reference was evaluated."""
    divergence: Mapping[str, Tensor] = field(default_factory=dict)
    """View -> [B], once the policy was evaluated after the reference."""
    typicality: Mapping[str, Tensor] = field(default_factory=dict)
    """View -> [B], once the policy was evaluated, where it is asked for."""
    reference_tokens: Mapping[str, Tensor] = field(default_factory=dict)
    """View -> [B, L], once the reference was evaluated, where it is asked for."""
    policy_tokens: Mapping[str, Tensor] = field(default_factory=dict)
    """The same of the policy."""
    top: Tensor | None = None
    """Entropy and mass of the policy's top tokens, [2], once it was evaluated in training."""

    def of_cells(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values at the tokens of all groups, [P, ...], group by group."""
        return values.split([len(tokens) for tokens in self.tokens])


@dataclass(frozen=True, kw_only=True)
class Tokens(AbstractLikelihood[VisionLanguageModel, TokenBatch, PreparedTokens]):
    """Log-probability of the tokens of a response, the one that ends it included."""

    batch_type: ClassVar[type] = TokenBatch
    measures: ClassVar[Measure] = "token log-probability"
    rounds_below: ClassVar[float] = 1.0  # of a nat: logits are some tens, and rounded as such

    reduction: Reduction = "sum"
    """Over the tokens of a response, each times its weight: `sum` as published for DPO and most of
    its relatives (beta near 0.1), or `mean`, which divides by the sum of the weights (IPO in its
    authors' advice, RLHF-V's normalised score)."""
    divergence: bool = False
    """Compare the distributions over the whole vocabulary as well, for objectives such as tdpo."""
    typicality: bool = False
    """Measure how typical each response is of what the policy would say itself, for the objective
    wpo."""
    each_token: bool = False
    """Give each token by itself as well, for objectives such as grpo."""
    gains: dict[str, VisualGain] = field(default_factory=dict)
    """Weight maps that are made here, for views such as `chosen:gain`."""
    own_condition: str = "diffuse"
    """What disturbs the images next to which the response `own` is chosen."""
    concatenated: bool = True
    """Send all views through the model at once, padded to the longest. False sends them one after
    the other: with gradient checkpointing that takes less memory, and gives the same numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.each_token and self.reduction == "mean":
            raise ValueError(
                "each_token is true, for losses that do their own counting of tokens, and "
                "reduction is mean, which keeps no count: set reduction to sum"
            )

    def check(self, model: AbstractModel) -> None:
        if not isinstance(model, VLM):
            raise ValueError(
                "tokens measures the responses of a vision-language model: set model.kind to vlm"
            )
        if model.prefix == "shared" and not self.concatenated:
            raise ValueError(
                "concatenated is false, which sends one response after the other, and model.prefix "
                "is shared, which sends those of a pair in one row: set either to its default"
            )

    def data_views(self, views: frozenset[str]) -> frozenset[str]:
        """A weight map or response that is made here is replaced by what it is made of."""
        needed: set[str] = set()
        for view in map(View.parse, views):
            response, condition = self._forward_group(view)
            weights = None if view.weights in self.gains else view.weights
            needed.add(str(View(response, weights, condition)))
            if view.weights in self.gains:
                if view.condition is not None or view.response == OWN:
                    raise ValueError(
                        f"the view {view} weighs tokens by the gain from images, which is "
                        f"defined for a response of the data set next to its own images"
                    )
                needed.add(str(View(response, None, self.gains[view.weights].condition)))
            if view.response == OWN:
                needed.add(str(View(_CHOSEN, None, self.own_condition)))
        return frozenset(needed)

    def check_known_in_advance(self, views: frozenset[str]) -> None:
        if self.divergence:
            raise ValueError(
                "likelihood.divergence compares policy and reference over the whole vocabulary at "
                "every token, for which one number a response is not enough"
            )
        if self.each_token:
            raise ValueError(
                "likelihood.each_token compares policy and reference token by token, for which one "
                "number a response is not enough"
            )
        for view in map(View.parse, sorted(views)):
            if view.response == OWN or view.weights in self.gains:
                raise ValueError(
                    f"the view {view} is made by the policy as it is at each step, and so its "
                    f"reference value cannot be computed in advance"
                )

    def defining_settings(self) -> dict[str, str]:
        return {"reduction": self.reduction}

    @property
    def gives_divergence(self) -> bool:
        return self.divergence

    @property
    def gives_measured(self) -> frozenset[Measured]:
        asked = {"typicality": self.typicality, "tokens": self.each_token}
        return frozenset(name for name in _MEASURED if asked[name])

    @torch.no_grad()
    def prepare(self, model: VisionLanguageModel, batch: TokenBatch) -> PreparedTokens:
        """Look at the images once, and lay out the rows of every group."""
        parsed = {name: View.parse(name) for name in sorted(batch.views)}
        read = [self._forward_group(view) for view in parsed.values()]
        known = dict.fromkeys([*read, *filter(None, map(self._disturbed, parsed.values()))])
        asked = [group for group in known if group[0] in batch.responses]  # no sample may have it
        forward = RowsOfBatch(model, batch)
        bundles = forward.bundles(asked) if self.concatenated else [(group,) for group in asked]
        groups = [group for bundle in bundles for group in bundle]

        targets = [forward.tokens(group).ids[:, None] for group in groups]
        if any(view.response == OWN for view in parsed.values()):
            own = forward.choices((_CHOSEN, self.own_condition))
            given = [send(ids, forward.device) for ids in targets]
            targets = [
                torch.cat([ids, own[:, None] if response == _CHOSEN else ids], dim=1)
                for (response, _), ids in zip(groups, given, strict=True)
            ]
        return PreparedTokens(
            groups=forward.rows(bundles, targets, concatenated=self.concatenated),
            tokens=[forward.tokens(group) for group in groups],
            views={
                name: PreparedView(
                    group=groups.index(self._forward_group(view)),
                    target=int(view.response == OWN),
                    weights=self._weights(forward, view),
                    rows=None
                    if batch.rows is None
                    else send(batch.rows[self._forward_group(view)[0]], forward.device),
                    old=send(batch.old_log_probs[view.response], forward.device)
                    if self.each_token and view.response in batch.old_log_probs
                    else None,
                    disturbed=groups.index(there) if (there := self._disturbed(view)) else None,
                    rejected=view.response == _REJECTED,
                )
                for name, view in parsed.items()
                if self._forward_group(view) in groups
            },
            empty=frozenset(n for n, v in parsed.items() if self._forward_group(v) not in groups),
            device=forward.device,
        )

    def evaluate(self, model: VisionLanguageModel, prepared: PreparedTokens) -> dict[str, Tensor]:
        keeps = self.divergence and model.is_reference
        scores = model.score(
            prepared.groups,
            reference=None if model.is_reference else prepared.reference_states,
            keep_states=keeps,
            typicality=self.typicality and not model.is_reference,
            logits=any(view.disturbed is not None for view in prepared.views.values()),
            top=torch.is_grad_enabled() and not model.is_reference,
        )
        if tops := [some.top for some in scores if some.top is not None]:
            prepared.top = torch.stack(tops).mean(dim=0)
        if keeps:
            prepared.reference_states = [some.states for some in scores if some.states is not None]
        elif prepared.reference_states is not None:
            found = [some.divergence for some in scores if some.divergence is not None]
            prepared.divergence = _of_views(prepared, torch.cat(found), self.reduction)
        if self.typicality and not model.is_reference:
            typical = [some.typicality for some in scores if some.typicality is not None]
            prepared.typicality = _of_views(prepared, torch.cat(typical), "mean")
        of_cells = prepared.of_cells(torch.cat([some.log_probs for some in scores]))
        each = {
            name: prepared.tokens[view.group].spread(of_cells[view.group][:, view.target])
            for name, view in prepared.views.items()
        }
        of_logits = [some.logits for some in scores if some.logits is not None]
        if of_logits:
            logits = prepared.of_cells(torch.cat(of_logits))
            for name, view in prepared.views.items():
                if view.disturbed is not None:
                    pair = logits[view.group], logits[view.disturbed]
                    added = released_gain(*pair, rejected=view.rejected)
                    each[name] = each[name] + prepared.tokens[view.group].spread(added)
        if self.each_token and model.is_reference:
            prepared.reference_tokens = each
        elif self.each_token:
            prepared.policy_tokens = each
        measured = {
            name: _over_tokens(each[name], view.weights, self.reduction)
            for name, view in prepared.views.items()
        }
        nothing = torch.zeros(0, device=prepared.device)
        return {**measured, **dict.fromkeys(prepared.empty, nothing)}

    def row_metadata(self, prepared: PreparedTokens) -> dict[str, dict[str, Tensor]]:
        """Weights of a row's tokens in all, as `length` of a sum; the divergence; and which samples
        the rows are of, where not every sample has every view."""
        row_metadata: dict[str, dict[str, Tensor]] = {name: {} for name in prepared.views}
        for name in prepared.empty:
            nothing = torch.zeros(0, device=prepared.device)
            row_metadata[name] = {"rows": nothing.long()}
            if self.reduction == "sum":
                row_metadata[name]["length"] = nothing
        for name, view in prepared.views.items():
            if self.reduction == "sum":
                row_metadata[name]["length"] = view.weights.sum(dim=1)
            if view.rows is not None:
                row_metadata[name]["rows"] = view.rows
            if name in prepared.divergence:
                row_metadata[name]["divergence"] = prepared.divergence[name]
            if name in prepared.typicality:
                row_metadata[name]["typicality"] = prepared.typicality[name]
        return row_metadata

    def token_likelihoods(self, prepared: PreparedTokens) -> dict[str, TokenLikelihoods]:
        return {
            name: TokenLikelihoods(
                policy=policy,
                weights=prepared.views[name].weights,
                old=prepared.views[name].old,
                reference=prepared.reference_tokens.get(name),
            )
            for name, policy in prepared.policy_tokens.items()
        }

    def describe(self) -> str:
        """One line for the start of a run."""
        unit = {
            "sum": "sum over the tokens of a response, in nats",
            "mean": "MEAN over the tokens of a response: published betas presuppose the sum",
        }[self.reduction]
        return f"log-probability of responses; {unit}"

    def shares_prefix(self, model: AbstractModel) -> bool:
        """Whether the responses of a sample are branches of one row, as far as settings tell."""
        assert isinstance(model, VLM), "the config was checked"
        return self.concatenated and model.prefix_obstacle is None

    def packing_obstacle(self, model: AbstractModel) -> str | None:
        """Why rows do not go one after the other through a model; None where they can."""
        assert isinstance(model, VLM), "the config was checked"
        return packing_obstacle(model.config, attention=model.attention)

    def figures(self, prepared: PreparedTokens) -> Mapping[str, Tensor]:
        """`padding`: the share of what goes through the model that is padding; `top_entropy` and
        `top_mass` of the policy in training."""
        masks = [rows.attention_mask for rows in prepared.groups]
        padding = torch.cat([(mask == 0).float().flatten() for mask in masks])
        top = prepared.top
        sure = {} if top is None else {"top_entropy": top[0], "top_mass": top[1]}
        return {"padding": padding, **sure}

    def note(self, model: AbstractModel) -> str:
        assert isinstance(model, VLM), "the config was checked"
        try:
            why = model.prefix_obstacle
        except ModelError:
            return ""  # the check of the model says what is wrong with it
        if why is None and not self.concatenated:
            why = "likelihood.concatenated is false"
        if why is None:
            return "shared: image and prompt are computed once for the responses that follow them"
        return f"repeated: image and prompt are computed for each response, since {why}"

    def _forward_group(self, view: View) -> ForwardGroup:
        return (_CHOSEN if view.response == OWN else view.response), view.condition

    def _disturbed(self, view: View) -> ForwardGroup | None:
        """The group whose logits a gain as released reads as well."""
        gain = self.gains.get(view.weights or "")
        return (view.response, gain.condition) if gain and gain.form == "released" else None

    def _weights(self, forward: RowsOfBatch, view: View) -> Tensor:
        """How much the tokens of a view count, float32 [B, L], on the device."""
        response, _ = group = self._forward_group(view)
        if view.weights is None or self._disturbed(view) is not None:
            return send(forward.batch.responses[response].response_mask.float(), forward.device)
        if view.weights not in self.gains:
            return send(forward.batch.weights[f"{response}:{view.weights}"], forward.device)
        clear = forward.log_probs(group)
        disturbed = forward.log_probs((response, self.gains[view.weights].condition))
        gain = torch.sigmoid(clear - disturbed)
        return forward.tokens(group).spread(1.5 - gain if response == _REJECTED else 0.5 + gain)


def _over_tokens(values: Tensor, weights: Tensor, reduction: Reduction) -> Tensor:
    """One number per row of values at tokens; both [B, L]."""
    total = (values * weights).sum(dim=1)
    return total / weights.sum(dim=1) if reduction == "mean" else total


def _of_views(prepared: PreparedTokens, found: Tensor, reduction: Reduction) -> dict[str, Tensor]:
    """View -> [B], from values at the tokens of all groups; every token counts once."""
    of_cells = prepared.of_cells(found)
    reduced = {}
    for name, view in prepared.views.items():
        tokens, values = prepared.tokens[view.group], of_cells[view.group]
        once = tokens.spread(torch.ones_like(values))
        reduced[name] = _over_tokens(tokens.spread(values), once, reduction)
    return reduced
