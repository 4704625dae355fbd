"""Snapshots of the policies that rounds began with, on disk, and which is a round's reference."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from diffalign import world
from diffalign.errors import DataError
from diffalign.files import read_tensors, write_atomically, writing
from diffalign.models.base import AbstractTrainable
from diffalign.rollouts.base import ReferenceRule
from diffalign.seeding import derive_seed


def reference_round(rule: ReferenceRule, run_seed: int, number: int) -> int:
    """The round whose first policy is the reference of round `number`."""
    if rule == "uniform":
        return derive_seed(run_seed, "reference", number) % (number + 1)
    return number if rule == "latest" else 0


class PolicySnapshots:
    """Keeps what the rule may ask for, and nothing where the reference never moves."""

    def __init__(self, folder: Path, *, rule: ReferenceRule, run_seed: int) -> None:
        """Args:
        folder: of all rounds.
        rule: which policy is the reference.
        run_seed: of the run.
        """
        self._folder = folder
        self._rule = rule
        self._run_seed = run_seed

    def keep(self, model: AbstractTrainable, number: int) -> None:
        """Store the policy that round `number` begins with."""
        if self._rule == "initial":
            return
        if world.is_main() and not self._file(number).exists():
            with writing(self._file(number)):
                write_atomically(self._file(number), save(model.snapshot()))
        world.wait()

    def refer(self, model: AbstractTrainable, number: int) -> None:
        """Make the model compare itself with the reference of round `number`.

        Raises:
            DataError: the file of that policy is gone or damaged.
        """
        if self._rule == "initial":
            return
        path = self._file(reference_round(self._rule, self._run_seed, number))
        try:
            values = read_tensors(path)
        except DataError as error:
            raise DataError(
                f"{path}: round {number} is compared with this policy, and it cannot be read "
                f"({error}). Put the file back, or start afresh"
            ) from error
        model.refer_to(values)

    def release(self, *, before: int) -> None:
        """Delete the policies of rounds before `before`, unless a later round may ask for them."""
        if self._rule == "latest":
            for number in range(before):
                self._file(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}" / "policy.safetensors"
