"""The reference that a policy is compared with, run through the policy's own code path."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from diffalign.models.base import ReferenceKind
from diffalign.models.lora import adapter_layers, disabled


class AbstractReference(abc.ABC):
    """Which network is called in place of the policy."""

    @abc.abstractmethod
    def instead_of(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the context, the network that it yields is the reference.

        Args:
            policy: the network in training, as it may have been wrapped for several processes.
        """

    def refer_to(self, values: Mapping[str, Tensor]) -> None:
        """Be the policy with these values of its trained parameters from now on, by name.

        Raises:
            ValueError: the reference is always the same, or names or shapes do not fit.
        """
        raise ValueError(
            "this model's reference is fixed: load it with reference past_policy to choose it"
        )


class AdapterOff(AbstractReference):
    """The policy's own network with its adapter disabled: no second set of weights."""

    def __init__(self, network: nn.Module, *, next_to: PastPolicy | None = None) -> None:
        """
        Args:
            network: carries the adapter.
            next_to: the starting values of what trains besides the adapter, such as a projector.
        """
        self._layers = adapter_layers(network)
        self._next_to = next_to

    @contextmanager
    def instead_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        next_to = nullcontext() if self._next_to is None else self._next_to.instead_of(policy)
        with disabled(self._layers), next_to:
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


class PastPolicy(AbstractReference):
    """The policy's own network with the values that its trained parameters had at another time.

    At first these are the starting weights. The parameters stay the same objects, so optimiser and
    wrappers notice nothing; what is exchanged is the storage that they point to. It costs one copy
    of the trained parameters on the device, which for an adapter is little.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}

    def refer_to(self, values: Mapping[str, Tensor]) -> None:
        """See `AbstractReference`; values may be on any device, and are copied."""
        if values.keys() != self._values.keys():
            different = sorted(values.keys() ^ self._values.keys())
            raise ValueError(
                f"a past policy must name every trained parameter and no other; differing: "
                f"{', '.join(different[:5])} ({len(different)} in all)"
            )
        for name, value in values.items():
            if value.shape != self._values[name].shape:
                raise ValueError(
                    f"a past policy has {name} of shape {tuple(value.shape)}, and the trained "
                    f"parameter is of shape {tuple(self._values[name].shape)}"
                )
        for name, value in values.items():
            self._values[name].copy_(value.detach())

    @contextmanager
    def instead_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        current = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._values[name]
            yield policy
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = current[name]


class NoReference(AbstractReference):
    """For objectives that need none; entering it is a mistake of the caller."""

    @contextmanager
    def instead_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        raise ValueError(
            "this model was loaded with reference 'none' and has nothing to compare with: "
            "set reference to adapter_off (LoRA), frozen_copy or past_policy"
        )
        yield policy


def reference_of(
    kind: ReferenceKind, policy: nn.Module, frozen_copy: nn.Module | None
) -> AbstractReference:
    """The network in place of the policy within `AbstractTrainable.reference`.

    Args:
        kind: as a run's settings name it.
        policy: the network in training.
        frozen_copy: of it, for the kind of that name; else None.
    """
    if frozen_copy is not None:
        return FrozenCopy(frozen_copy)
    if kind == "past_policy":
        return PastPolicy(policy)
    return AdapterOff(policy) if kind == "adapter_off" else NoReference()
