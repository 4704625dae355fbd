"""How the samples of an optimiser step are shared among processes and forward passes.

A run sees one endless sequence of samples, cut into global micro-batches of a size that is fixed
where it starts. Every forward pass takes a part of one of them, and the parts go to the ranks in
turn. So the samples of a step, and their order, are the same for every number of processes; what
adapts is how many forward passes each of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from diffalign import world
from diffalign.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a run on the processes that it has now."""

    samples_per_device: int
    """Of one forward pass."""
    micro_batch: int
    """Samples of a global micro-batch, a multiple of `samples_per_device`; in data with buckets,
    those of one are of one size."""
    micro_batches: int
    """Global micro-batches of an optimiser step."""
    processes: int = 1
    """On how many the run started; nothing but its identity depends on it."""
    tokens_per_device: int | None = None
    """Tokens of one forward pass at most, where a rank cuts its samples of a step by their length;
    None cuts them into parts of `samples_per_device`."""

    @classmethod
    def start(
        cls, *, samples_per_device: int, accumulation: int, tokens_per_device: int | None = None
    ) -> Layout:
        """That of a run which starts on these processes."""
        return cls(
            samples_per_device=samples_per_device,
            micro_batch=samples_per_device * world.size(),
            micro_batches=accumulation,
            processes=world.size(),
            tokens_per_device=tokens_per_device,
        )

    @property
    def samples_per_step(self) -> int:
        """Over all ranks: the effective batch."""
        return self.micro_batch * self.micro_batches

    @property
    def samples_of_rank(self) -> int:
        """Of an optimiser step, on each rank."""
        return self.samples_per_step // world.size()

    @property
    def accumulation(self) -> int:
        """Forward passes of an optimiser step on each rank, where none is cut by length."""
        return self.samples_per_step // self._at_once

    @property
    def _at_once(self) -> int:
        return self.samples_per_device * world.size()

    def on_these_processes(self, samples_per_device: int) -> Layout:
        """The same steps on the processes of now, in forward passes of another size.

        Raises:
            ConfigError: they cannot be cut so; the message says which numbers would do.
        """
        layout = replace(self, samples_per_device=samples_per_device)
        if self.micro_batch % samples_per_device:
            raise ConfigError(
                f"training.samples_per_device is {samples_per_device}, and a global micro-batch of "
                f"this run has {self.micro_batch} samples, which stays: set it to a divisor of "
                f"that, such as {_divisors(self.micro_batch)}"
            )
        if self.samples_per_step % layout._at_once:
            passes = self.samples_per_step // samples_per_device
            less = [n for n in range(1, samples_per_device) if self.micro_batch % n == 0]
            fits = [n for n in less if self.samples_per_step % (n * world.size()) == 0]
            other = f", or training.samples_per_device={fits[-1]}" if fits else ""
            raise ConfigError(
                f"an optimiser step of this run is {self.samples_per_step} samples, {passes} "
                f"forward passes of {samples_per_device}, and {world.size()} processes cannot "
                f"share them equally: take one of {_divisors(passes)} processes{other}"
            )
        return layout

    def own_parts(self, samples: int) -> Iterator[range]:
        """This rank's parts of the endless sequence, one a forward pass, without end.

        Args:
            samples: of all ranks, that were seen before: as many as whole steps have, or what
                `seen_after` said on as many processes.
        """
        first = samples + world.rank() * self.samples_per_device
        while True:
            yield range(first, first + self.samples_per_device)
            first += self._at_once

    def own_parts_of(self, first: int, end: int) -> Iterator[range]:
        """`own_parts` from one whole step to another."""
        return takewhile(lambda part: part.start < end, self.own_parts(first))

    def seen_after(self, samples: int) -> int:
        """How many samples all ranks have seen after the next forward pass of each."""
        return samples + self._at_once

    def check_micro_batch(self, saved: int) -> None:
        """Raise DataError for a position of a run with global micro-batches of another size."""
        if saved != self.micro_batch:
            raise DataError(
                f"the checkpoint's place in the data counts micro-batches of {saved} samples, and "
                f"those of this run have {self.micro_batch}, over all processes: resume with the "
                f"layout that the run started with (training.samples_per_device times processes)"
            )

    def place(self, sample: int) -> tuple[int, int]:
        """The number of the global micro-batch that a sample is in, and its place there."""
        return divmod(sample, self.micro_batch)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
