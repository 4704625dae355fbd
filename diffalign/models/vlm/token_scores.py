"""Log-probabilities of the tokens of responses, without ever holding all logits.

A batch of four responses of 500 tokens with their prompts over 152,000 words would be 10 GB of
logits in float32, twice for policy and reference. The head runs on the tokens of responses alone, a
few at a time, and again in the backward pass.

Sources: Zeng et al. 2024, arXiv:2404.11999 (TDPO), sequential KL divergence; Shi et al. 2024,
Understanding likelihood over-optimisation, arXiv:2410.11677 (entropy and mass of the top tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from diffalign.models.vlm.branches import Branches
from diffalign.models.vlm.families import ModuleNames
from diffalign.models.vlm.quirks.base import family_of
from diffalign.models.vlm.vision_pass import ImageInputs, replaced_forward, shown
from diffalign.models.vlm.vocabulary_head import bounded, head_log_probs


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of k tokens at each of P positions, in nats.

    Args:
        logits: shape [P, vocabulary], of the positions before the tokens.
        targets: int64 [P, k].

    Returns:
        Shape [P, k], float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets) - logits.logsumexp(dim=1, keepdim=True)


def token_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || policy) over the vocabulary at each of P positions, in nats.

    Args:
        policy: logits, shape [P, vocabulary]; gradient flows into these alone.
        reference: logits, same shape.

    Returns:
        Shape [P], float32 (float64 for float64 logits), at least 0.
    """
    dtype = torch.promote_types(policy.dtype, torch.float32)
    expected = reference.detach().to(dtype).log_softmax(dim=1)
    return (expected.exp() * (expected - policy.to(dtype).log_softmax(dim=1))).sum(dim=1)


def token_typicality(logits: Tensor, targets: Tensor) -> Tensor:
    """How probable a token is next to what the distribution's own samples are on average, in nats.

    Args:
        logits: shape [P, vocabulary].
        targets: int64 [P].

    Returns:
        log p(token) - log sum p^2, shape [P], float32 (float64 for float64 logits), without
        gradient.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.detach().to(dtype).log_softmax(dim=1)
    return log_probs.gather(1, targets[:, None])[:, 0] - (2 * log_probs).logsumexp(dim=1)


TOP = 10
"""Most probable tokens over which concentration is measured, as in its source."""
_LOOKED_AT = 128
"""Wanted tokens of a pass at which it is measured, evenly spaced: little of the head's work."""


def top_token_figures(logits: Tensor) -> Tensor:
    """How concentrated distributions over the vocabulary are.

    Args:
        logits: shape [P, vocabulary].

    Returns:
        Shape [2], float32 (float64 for float64 logits), without gradient: means over the positions
        of the entropy of the `TOP` most probable tokens, -sum p log p in nats, and of their mass.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.detach().to(dtype).log_softmax(dim=1)
    top = log_probs.topk(min(TOP, log_probs.shape[1]), dim=1).values
    probable = top.exp()
    return torch.stack([-(probable * top).sum(dim=1).mean(), probable.sum(dim=1).mean()])


@dataclass(frozen=True, kw_only=True)
class ResponseRows:
    """Rows that go through the model together, and which of their tokens are wanted."""

    input_ids: Tensor
    """Int64 [n, L], right-padded."""
    attention_mask: Tensor
    """Int64 [n, L]."""
    further: Mapping[str, Tensor]
    """Further inputs of the model per token, [n, L] each."""
    image_inputs: ImageInputs
    """Of all rows in reading order."""
    before: Tensor
    """Int64 [P], for every wanted token where the one before it stands, as indices into the n * L
    of all rows; branches of a row may begin after the same one."""
    targets: Tensor
    """Int64 [P, k]: tokens whose probability is wanted there, such as the ones that are there."""
    branches: Branches | None = None
    """Where some rows hold several responses; None where each holds one."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class States:
    """Hidden states before each wanted token, and the head that turns them into logits."""

    hidden: Tensor
    """Shape [P, width]."""
    weight: Tensor
    """Of its head, [vocabulary, width]."""
    bias: Tensor | None
    """Of its head, [vocabulary]."""
    softcap: float | None = None
    """What bounds its logits; None where nothing does."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Statistics of the wanted tokens of some rows under a model."""

    log_probs: Tensor
    """Float32 [P, k], in nats."""
    divergence: Tensor | None = None
    """Float32 [P], KL from the reference over the vocabulary; None where it was not asked for."""
    typicality: Tensor | None = None
    """Float32 [P], of the first wanted token, without gradient; None where it was not asked for."""
    logits: Tensor | None = None
    """Float32 [P], the logit of the first wanted token; None where it was not asked for."""
    states: States | None = None
    """For a divergence from this model; None where it was not asked for."""
    top: Tensor | None = None
    """Of `top_token_figures`, [2], at some of the positions; None where it was not asked for."""


class TokenScorer(nn.Module):
    """A vision-language model that gives log-probabilities of tokens.

    This is the module that is wrapped for several processes: one forward per step and model.
    """

    methods_of_shards: ClassVar[tuple[str, ...]] = ("choices",)
    """Besides `forward`: see `models.sharding.Sharder`."""

    def __init__(self, model: Any, module_names: ModuleNames, *, positions_at_once: int) -> None:
        """Wrap a model of transformers.

        Args:
            model: what trains in it requires grad already.
            module_names: where its parts are.
            positions_at_once: tokens whose logits exist at the same time.
        """
        super().__init__()
        self.family = family_of(model.config)
        self.model = self.family.repaired(model)
        self.module_names = module_names
        self.positions_at_once = positions_at_once

    def forward(
        self,
        groups: Sequence[ResponseRows],
        *,
        reference: Sequence[States] | None = None,
        keep_states: bool = False,
        typicality: bool = False,
        logits: bool = False,
        top: bool = False,
    ) -> list[TokenScores]:
        """Score the wanted tokens of all groups, one group after the other.

        Args:
            groups: of rows.
            reference: what a reference kept of the same groups; asks for the divergence from it.
            keep_states: keep, without gradient, what a divergence from this model will need.
            typicality: measure it as well; see `token_typicality`.
            logits: give those of the first wanted tokens as well.
            top: measure it as well; see `top_token_figures`.
        """
        scores = []
        for number, rows in enumerate(groups):
            hidden = self._hidden(rows)
            other = None if reference is None else reference[number]
            found = self._score(hidden, rows.targets, other, typicality, logits)
            log_probs, divergence, typical, of_token = (_joined(parts) for parts in found)
            assert log_probs is not None, "it is always asked for"
            if not rows.image_inputs.inputs:
                log_probs = log_probs + self._nothing_seen()
            states = self._states(hidden) if keep_states else None
            scores.append(
                TokenScores(
                    log_probs=log_probs,
                    divergence=divergence,
                    typicality=typical,
                    logits=of_token,
                    states=states,
                    top=self._top(hidden) if top and len(hidden) else None,
                )
            )
        return scores

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())

    @torch.no_grad()
    def choices(self, rows: ResponseRows) -> Tensor:
        """The most probable token at each wanted position, given all tokens before: int64 [P]."""
        hidden = self._hidden(rows)
        return torch.cat([self._head(some).argmax(1) for some in self._split(hidden)])

    def head_is_whole(self) -> bool:
        """Whether the model's logits are what its head makes of its hidden states, bounded as its
        configuration says.

        Some models scale them afterwards; a forward of two tokens through none of the blocks tells,
        before a network is shared out.
        """
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=self._head.weight.device)
        with torch.no_grad(), _without(self._blocks):
            hidden = self.last_hidden_state(input_ids=tokens)
            logits = self.model(input_ids=tokens, use_cache=False).logits
            return torch.allclose(self._logits(hidden), logits, rtol=1e-5, atol=1e-6)

    def last_hidden_state(self, **inputs: Any) -> Tensor:
        """What the head would be given, [n, L, width].

        Args:
            **inputs: of the model.
        """
        if self.module_names.body:
            output = self.body(**inputs, use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden
        with replaced_forward(self._head, lambda _: lambda states: states):
            states: Tensor = self.model(**inputs, use_cache=False).logits
        return states

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the language model's blocks, by which its weights are shared out."""
        return sorted({type(block).__name__ for block in self._blocks})

    @property
    def _blocks(self) -> nn.ModuleList:
        lists = (module for module in self.language.modules() if isinstance(module, nn.ModuleList))
        return next(lists, nn.ModuleList())

    def whole_parts(self) -> list[nn.Module]:
        """Of a vision tower what never trains: it runs outside of `forward`, and is small."""
        return [
            module
            for module in self.tower.modules()
            if not any(parameter.requires_grad for parameter in module.parameters())
        ]

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.model.get_submodule(self.module_names.tower)

    @property
    def language(self) -> nn.Module:
        """The language model, without its head."""
        return self.model.get_submodule(self.module_names.language)

    @property
    def projector(self) -> nn.Module:
        """The projector, which may lie within the tower."""
        return self.model.get_submodule(self.module_names.projector)

    @property
    def body(self) -> Any:
        """The model without its head; all of it where the head lies within."""
        return self.model.get_submodule(self.module_names.body)

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_submodule(self.module_names.head)

    def _logits(self, hidden: Tensor) -> Tensor:
        return bounded(self._head(hidden), self.family.softcap)

    def _hidden(self, rows: ResponseRows) -> Tensor:
        """Hidden states from which the wanted tokens are predicted, [P, width]."""
        told: dict[str, Any] = {"attention_mask": rows.attention_mask}
        around: AbstractContextManager[None] = nullcontext()
        if rows.branches is not None:
            told |= rows.branches.arguments()
            if self.family.masks_go_around:
                around = self._with_masks(told.pop("attention_mask"))
        with shown(self.tower, rows.image_inputs.features), around:
            hidden = self.last_hidden_state(
                input_ids=rows.input_ids, **told, **rows.further, **rows.image_inputs.inputs
            )
        return hidden.flatten(0, 1).index_select(0, rows.before)

    def _with_masks(self, masks: Any) -> AbstractContextManager[None]:
        """Within this context the language model gets these in place of what it is given."""

        def replace(forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": masks})

        language = self.model.get_submodule(self.module_names.language)
        return replaced_forward(language, replace)

    def _score(
        self,
        hidden: Tensor,
        targets: Tensor,
        other: States | None,
        typicality: bool,
        logits: bool,
    ) -> Sequence[Sequence[Tensor | None]]:
        """Each of the four statistics, piece by piece."""
        if other is None and not (typicality or logits) and targets.shape[1] == 1:
            log_probs = head_log_probs(
                hidden,
                self._head.weight,
                self._head.bias,
                targets[:, 0],
                positions_at_once=self.positions_at_once,
                softcap=self.family.softcap,
            )
            return [[log_probs[:, None]], [None], [None], [None]]
        pieces = self._split(hidden)
        others = [None] * len(pieces) if other is None else self._split(other.hidden)
        parts = []
        for some, wanted, theirs in zip(pieces, self._split(targets), others, strict=True):
            arguments = (some, wanted, theirs, other, typicality, logits)
            if torch.is_grad_enabled():
                part = checkpoint(
                    self._score_some, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part = self._score_some(*arguments)
            parts.append(part)
        return list(zip(*parts, strict=True))

    def _score_some(
        self,
        hidden: Tensor,
        targets: Tensor,
        theirs: Tensor | None,
        other: States | None,
        typicality: bool,
        of_token: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        logits = self._logits(hidden)
        divergence = None
        if theirs is not None and other is not None:
            expected = bounded(linear(theirs, other.weight, other.bias), other.softcap)
            divergence = token_divergence(logits, expected)
        typical = token_typicality(logits, targets[:, 0]) if typicality else None
        own = None
        if of_token:
            own = logits.gather(1, targets[:, :1])[:, 0]
            own = own.to(torch.promote_types(own.dtype, torch.float32))
        return token_log_probs(logits, targets), divergence, typical, own

    @torch.no_grad()
    def _top(self, hidden: Tensor) -> Tensor:
        count = min(_LOOKED_AT, self.positions_at_once)
        apart = max(1, len(hidden) // count)
        return top_token_figures(self._logits(hidden[::apart][:count]))

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.positions_at_once)

    def _states(self, hidden: Tensor) -> States:
        bias = self._head.bias
        return States(
            hidden=hidden.detach(),
            weight=self._head.weight.detach(),
            bias=None if bias is None else bias.detach(),
            softcap=self.family.softcap,
        )

    def _nothing_seen(self) -> Tensor | float:
        """Zero, as a function of everything that trains and that text alone leaves unused.

        Processes that average gradients wait for each other's gradient of every parameter.
        """
        parts = (self.module_names.tower, self.module_names.projector, "model.image_newline")
        unused = [
            parameter.sum()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name.startswith(parts)
        ]
        return 0.0 * torch.stack(unused).sum() if unused else 0.0


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


@contextmanager
def _without(blocks: nn.ModuleList) -> Iterator[None]:
    """Leave a list of modules empty meanwhile."""
    held = list(blocks)
    del blocks[:]
    try:
        yield
    finally:
        blocks.extend(held)
