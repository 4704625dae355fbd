"""The contract of a head, and the small networks that heads are made of."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DataError, did_you_mean
from diffalign.ranges import Ranged

_NAMED = 8


@dataclass(frozen=True)
class Features:
    """What an encoder makes of n images and their prompts."""

    joint: Tensor
    """Shape [n, width], float32, entries of about 1."""
    plain: Tensor | None = None
    """What the encoder itself says of them, [n], such as CLIP's scaled cosine; None where it says
    nothing."""


@dataclass(frozen=True, kw_only=True)
class AbstractHead(Ranged, abc.ABC):
    """The settings of a head; its module is its `kind`."""

    compares: ClassVar[bool] = False
    """Whether it only says of two images which is preferred, and scores none by itself."""
    needs_plain: ClassVar[bool] = False
    """Whether the encoder has to have a score of its own."""

    @property
    def known_users(self) -> tuple[str, ...]:
        """Those whose tastes it tells apart; none where all are one."""
        return ()

    @abc.abstractmethod
    def build(self, width: int) -> nn.Module:
        """The head with its initial weights, the same ones each time.

        Args:
            width: of the features.

        Returns:
            A module from (`Features` of n images, int64 [n] users or None) to scores [n], or to
            what `sides` takes.
        """

    def sides(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Two numbers for each of n pairs, [n] each, whose difference is the log-odds that the
        first image is preferred.

        Args:
            chosen, rejected: what the module gave for either side.
        """
        return chosen, rejected

    def rows_of(self, users: Sequence[str]) -> Tensor | None:
        """Numbers of n users, int64 [n]; None where all are one.

        Raises:
            DataError: nobody says who they are, or one is unknown.
        """
        known = {name: row for row, name in enumerate(self.known_users)}
        if not known:
            return None
        for name in users:
            if name not in known:
                listed = ", ".join(list(known)[:_NAMED]) + ", ..." * (len(known) > _NAMED)
                raise DataError(
                    f"a verdict is by the user {name!r}, who is none of model.head.users "
                    f"({listed}): add them there.{did_you_mean(name, known)}"
                )
        return torch.tensor([known[name] for name in users])

    @abc.abstractmethod
    def describe(self) -> str:
        """The head as a noun phrase."""


def multilayer(widths: Sequence[int], *, seed: int, last_is_zero: bool = False) -> nn.Sequential:
    """Linear layers with GELU in between; torch's initial weights, by a seed of their own.

    Args:
        widths: of the input, of what is in between, and of the output.
        seed: of the weights.
        last_is_zero: whether the output is 0 at first.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first, second in pairwise(widths):
            layers += [nn.Linear(first, second), nn.GELU()]
    last = layers[-2]
    if last_is_zero and isinstance(last, nn.Linear):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers[:-1])
