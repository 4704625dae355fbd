"""The responses of a batch in the rows that go through a model.

Responses next to the same images and prompt are branches of one row (`models.vlm.branches`), where
the model takes them; all others have a row of their own. Rows may go one after the other in one
sequence (`models.vlm.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffalign.data.batches import TokenBatch, TokenRows
from diffalign.models.devices import send
from diffalign.models.vlm.branches import PADDING, Layout, stacked_blocks
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.models.vlm.packing import Packing, pack
from diffalign.models.vlm.token_scores import ResponseRows
from diffalign.models.vlm.vision_pass import ImageInputs

ForwardGroup = tuple[str, str | None]
"""A response of the data set and the condition of the images next to it: one run of the model."""

Bundle = tuple[ForwardGroup, ...]
"""Groups next to the same images, whose responses may be branches of the same rows."""


@dataclass(frozen=True, kw_only=True)
class TokensOfResponse:
    """Where the N tokens of B rows of one response stand."""

    rows: Tensor
    """Int64 [N]."""
    columns: Tensor
    """Int64 [N], from 1: nothing predicts the first token of a row."""
    ids: Tensor
    """Int64 [N]."""
    shape: tuple[int, int]
    """(B, L) of these rows."""

    @classmethod
    def of(cls, response: TokenRows) -> TokensOfResponse:
        """Find the tokens that the response mask marks."""
        rows, columns = response.response_mask.nonzero(as_tuple=True)
        assert not response.response_mask[:, 0].any(), "a response begins where a prompt ends"
        height, width = response.input_ids.shape
        return cls(
            rows=rows,
            columns=columns,
            ids=response.input_ids[rows, columns],
            shape=(height, width),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the tokens, [N], as [B, L] with zeros elsewhere."""
        height, width = self.shape
        flat = send(self.rows * width + self.columns, values.device)
        return values.new_zeros(height * width).scatter(0, flat, values).view(self.shape)


class RowsOfBatch:
    """A batch next to the model that reads it: the rows of any groups, laid out as asked."""

    def __init__(self, model: VisionLanguageModel, batch: TokenBatch) -> None:
        self.model, self.batch = model, batch
        self._seen = {name: model.look(some) for name, some in batch.image_inputs.items()}
        self._own = {group: model.look(some) for group, some in batch.own_image_inputs.items()}
        self.device = model.device
        self._tokens = {
            name: TokensOfResponse.of(response) for name, response in batch.responses.items()
        }

    def tokens(self, group: ForwardGroup) -> TokensOfResponse:
        return self._tokens[group[0]]

    def bundles(self, groups: Sequence[ForwardGroup]) -> list[Bundle]:
        """Groups next to the same images together, and those that are alone after them.

        It depends on nothing but the views: all processes run the network equally often.
        """
        if not self.model.shares_prefix or self.batch.rows is not None:
            return [(group,) for group in groups]
        of_condition = [
            tuple(group for group in groups if group[1] == condition)
            for condition in dict.fromkeys(condition for _, condition in groups)
        ]
        return sorted(of_condition, key=lambda bundle: len(bundle) == 1)

    def rows(
        self, bundles: Sequence[Bundle], targets: Sequence[Tensor], *, concatenated: bool
    ) -> list[ResponseRows]:
        """The rows of the bundles as one group; those with branches and the others as one each.

        Args:
            bundles: from `bundles`.
            targets: of every group in it, int64 [N, k].
            concatenated: False gives each group rows of its own, one after the other.
        """
        if not concatenated:
            return [
                self._checked([bundle], wanted)
                for bundle, wanted in zip(bundles, targets, strict=True)
            ]
        several = [bundle for bundle in bundles if len(bundle) > 1]
        alone = [bundle for bundle in bundles if len(bundle) == 1]
        branches = sum(map(len, several))
        found = []
        if several:
            found.append(self._checked(several, torch.cat(list(targets[:branches]))))
        if alone:
            found.append(self._checked(alone, torch.cat(list(targets[branches:]))))
        return found

    def _checked(self, bundles: Sequence[Bundle], targets: Tensor) -> ResponseRows:
        """Rows with branches and packed, as far as that was asked for; plain ones where some
        sample's responses are about different images, and where the model gave other numbers."""
        apart: list[Bundle] = [(group,) for bundle in bundles for group in bundle]
        pack_to = self.model.packs_up_to(self.batch.pack_to)
        if not self.model.prefix_agrees or (len(apart) == len(bundles) and pack_to is None):
            return self._rows(apart, targets)
        laid_out: list[Bundle] = []
        for bundle in bundles:
            laid_out += [bundle] if self._sees_the_same(bundle) else [(group,) for group in bundle]
        rows = self._rows(laid_out, targets, pack_to)
        if self.model.must_check_prefix(rows):
            plain = self._rows(apart, targets)
            counts = [len(self.tokens(group)) for (group,) in apart]
            if not self.model.check_prefix(rows, plain, counts):
                return plain
        return rows

    def _sees_the_same(self, bundle: Bundle) -> bool:
        """Whether in every sample all images, and all tokens that others see ahead of them, stand
        before responses begin to differ."""
        if len(bundle) == 1:
            return True
        if any(group in self._own for group in bundle):
            return False
        layout, markers = self._layout(bundle), torch.tensor(self.model.placeholders)
        longest = self.model.family.longest_branched
        if longest is not None and layout.segments.shape[1] > longest:
            return False
        for n, (response, _) in enumerate(bundle):
            part, after = self.batch.responses[response], layout.after_prefix(n)
            blocks = self.model.family.blocks(self._token_inputs(part))
            ahead = torch.isin(part.input_ids, markers)
            ahead = ahead if blocks is None else ahead | (blocks >= 0)
            if ahead[after].any():
                return False
        return True

    def _token_inputs(self, part: TokenRows) -> Mapping[str, Tensor]:
        return self.model.family.token_inputs(part.further, part.response_mask)

    def _layout(self, bundle: Bundle) -> Layout:
        parts = [self.batch.responses[response] for response, _ in bundle]
        return Layout.of([p.input_ids for p in parts], [p.attention_mask for p in parts])

    def log_probs(self, group: ForwardGroup) -> Tensor:
        """Of a group's own tokens under the policy as it is, [N], on the device."""
        rows = self._rows([(group,)], self.tokens(group).ids[:, None])
        return self.model.log_probs(rows)[:, 0]

    def choices(self, group: ForwardGroup) -> Tensor:
        """The policy's most probable tokens in place of a group's own, int64 [N], on the device."""
        return self.model.choices(self._rows([(group,)], self.tokens(group).ids[:, None]))

    def _next_to(self, group: ForwardGroup) -> ImageInputs:
        """The images of the rows of a group."""
        own = self._own.get(group)
        return self._seen[group[1]] if own is None else own

    def _rows(
        self, bundles: Sequence[Bundle], targets: Tensor, pack_to: int | None = None
    ) -> ResponseRows:
        parts = [[self.batch.responses[response] for response, _ in bundle] for bundle in bundles]
        layouts = [self._layout(bundle) for bundle in bundles]
        longest = max(layout.segments.shape[1] for layout in layouts)

        def stack(rows: Sequence[Tensor], padding: int = 0) -> Tensor:
            padded = [pad(row, (0, longest - row.shape[1]), value=padding) for row in rows]
            return send(torch.cat(padded), self.device)

        def laid_out(values: Callable[[TokenRows], Tensor], padding: int = 0) -> Tensor:
            some = zip(layouts, parts, strict=True)
            rows = [lay.row([values(p) for p in of], padding=padding) for lay, of in some]
            return stack(rows, padding)

        def named(key: str) -> Tensor:
            return laid_out(lambda part: self._token_inputs(part)[key])

        above, before = 0, []
        for layout, bundle in zip(layouts, bundles, strict=True):
            for branch, tokens in enumerate(map(self.tokens, bundle)):
                rows, columns = layout.before(branch, tokens.rows, tokens.columns)
                before.append((above + rows) * longest + columns)
            above += len(layout.segments)
        packing = None
        if pack_to is not None:
            lengths = [int(n) for lay in layouts for n in (lay.segments != PADDING).sum(dim=1)]
            packing = Packing.of(lengths, longest, pack_to)
        image_inputs = ImageInputs.stack([self._next_to(bundle[0]) for bundle in bundles])
        segments = stack([layout.segments for layout in layouts], PADDING)
        inputs = {
            "input_ids": laid_out(lambda part: part.input_ids, self.model.pad_token_id),
            "attention_mask": (segments != PADDING).long(),
        }
        further = {key: named(key) for key in self._token_inputs(parts[0][0])}
        branches = None
        if packing is not None or any(len(bundle) > 1 for bundle in bundles):
            branches = self.model.branches(
                segments,
                stack([layout.shifts for layout in layouts]),
                {**inputs, **further, **image_inputs.inputs},
                stacked_blocks(layouts),
            )
        found = ResponseRows(
            **inputs,
            further=further,
            image_inputs=image_inputs,
            before=send(torch.cat(before), self.device),
            targets=send(targets, self.device),
            branches=branches,
        )
        if packing is None:
            return found
        return pack(found, packing, pad_token_id=self.model.pad_token_id)
