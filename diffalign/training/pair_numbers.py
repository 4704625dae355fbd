"""Numbers of the pairs of responses of a run, computed before it: `diffalign precompute --scores`.

They are of all pairs of the data, whatever the run takes of them, and of the model that its
training begins with. A start that was killed goes on from its last block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from diffalign import blocks
from diffalign.blocks import AbstractPlan, Block
from diffalign.data.responses.ranking import NumbersOf, write_pair_numbers
from diffalign.data.responses.source import ResponseSource
from diffalign.likelihoods.pair_numbers import PAIR_NUMBERS, pair_numbers
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.devices import DTYPES, choose_device
from diffalign.objectives.dpo import DPO
from diffalign.training import build
from diffalign.training.config import RunConfig

PAIRS_PER_BLOCK = 256


class PairNumbersPlan(AbstractPlan):
    """Numbers of the pairs of a run's data, under the model that its training begins with."""

    title, unit = "numbers", "pairs"

    def __init__(self, run_config: RunConfig, path: Path) -> None:
        """Look at the data; numbers of an earlier start are kept where they are of the same.

        Args:
            run_config: the run.
            path: of the file of numbers.
        """
        self._run, self._path = run_config, path
        self.folder, self.of = path.parent, path.name
        assert run_config.responses is not None, "the config was checked"
        whole = dataclasses.replace(
            run_config,
            responses=dataclasses.replace(run_config.responses, ranking=None),
            objective=DPO(beta=1.0),  # whose two views they are of
            likelihood=Tokens(),
        )
        source = cast(  # the config was checked
            ResponseSource, build.build_source(whole, Console(quiet=True), skipped=None)
        )
        self._samples = source.fixed_samples()
        self._about = NumbersOf(
            data=source.data_fingerprint, model=run_config.model.reference_settings()
        )
        self._identity = blocks.digest(
            [dataclasses.asdict(self._about), run_config.training.precision]
        )
        starts = range(0, len(source), PAIRS_PER_BLOCK)
        self.blocks = [
            Block.of(place, [self._identity, first, len(numbers)], len(numbers), numbers)
            for place, first in enumerate(starts)
            for numbers in [range(first, min(first + PAIRS_PER_BLOCK, len(source)))]
        ]

    def is_done(self, block: Block) -> bool:
        return False  # a file that is there is written anew

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        own = [row for row in rows if row["of"] == self._identity]  # not those of other settings
        if own:
            write_pair_numbers(self._path, self._about, own, list(PAIR_NUMBERS))

    def open(self, device: str | None, upcoming: Sequence[Block]) -> blocks.Do:
        model: Any = self._run.model.load(
            device=choose_device(device or "auto"),
            compute_dtype=DTYPES[self._run.training.precision],
            reference="none",
            trainable=False,
        )
        model.network.eval()

        def do(block: Block) -> list[blocks.Row | blocks.Failed]:
            made: list[blocks.Row | blocks.Failed] = []
            for batch in self._samples.sweep([(number, 0) for number in block.work]):
                numbers = pair_numbers(model, batch)
                for place, sample_id in enumerate(batch.sample_ids):
                    values = {name: float(found[place]) for name, found in numbers.items()}
                    row = {"sample_id": sample_id, "of": self._identity, **values}
                    made.append(blocks.Row(row))
            return made

        return do
