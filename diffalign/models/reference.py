"""The fixed reference that a policy is compared with, run through the policy's own code path."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from diffalign.models.lora import disabled


class AbstractReference(abc.ABC):
    """Which network is called in place of the policy."""

    @abc.abstractmethod
    def instead_of(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the context, the network that it yields is the reference.

        Args:
            policy: the network in training, as it may have been wrapped for several processes.
        """


class AdapterOff(AbstractReference):
    """The policy's own network with its adapter disabled: no second set of weights."""

    @contextmanager
    def instead_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        with disabled(policy):
            yield policy


class FrozenCopy(AbstractReference):
    """A second network that never changes, for training all weights.

    It follows the policy's mode. There is no dropout to switch off in it, but diffusers lays out
    tensors differently while training, and sums then differ in the last bit.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @contextmanager
    def instead_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.network.train(policy.training)


class NoReference(AbstractReference):
    """For objectives that need none; entering it is a mistake of the caller."""

    @contextmanager
    def instead_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        raise ValueError(
            "this model was loaded with reference 'none' and has nothing to compare with: "
            "set reference to adapter_off (LoRA) or frozen_copy"
        )
        yield policy
