"""The contract of a model: all that the trainer may know about it."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.errors import ModelError
from diffalign.ranges import Ranged

if TYPE_CHECKING:  # settings are read where nothing is loaded, and torch takes a second
    import torch
    from torch import Tensor, nn

    from diffalign.models.sharding import Sharder

ReferenceKind = Literal["adapter_off", "frozen_copy", "past_policy", "none"]


class AbstractTrainable(abc.ABC):
    """A loaded model: one network in training, and the frozen parts around it."""

    network: nn.Module
    """The one module given to `accelerator.prepare`; the trainer stores what came back here, and
    this is what every policy forward calls. Otherwise gradients are not averaged over ranks."""
    evaluations: int = 0
    """Rows that this process has sent through a network so far, policy and reference alike."""

    @abc.abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Within this context evaluations run the fixed reference, through the same code path."""

    @abc.abstractmethod
    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimiser gets, in a fixed order."""

    def learning_rates(self) -> Mapping[str, float]:
        """Peak learning rates of trained parameters that have their own, by name."""
        return {}

    def snapshot(self) -> dict[str, Tensor]:
        """The trained parameters as they are now, copied to the CPU, by name."""
        return {name: p.detach().cpu().clone() for name, p in self.trained_parameters()}

    def refer_to(self, values: Mapping[str, Tensor]) -> None:
        """Be the policy that had these trained parameters, within `reference()`, from now on.

        Args:
            values: one for every trained parameter, by name, such as an earlier `snapshot`.

        Raises:
            ValueError: names or shapes do not fit, or the model was loaded with another reference.
        """
        raise ValueError(f"{type(self).__name__} compares with no policy of another time")

    def blame(self) -> str | None:
        """Why values were not finite, where a frozen part next to the network made them so: a
        sentence with the way out, or None. It waits for the device."""
        return None

    def remarks(self) -> list[str]:
        """Sentences for the user that came up since it was last asked."""
        return []

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Identifies base weights and shape of the training (adapter or full)."""

    @abc.abstractmethod
    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what `from_pretrained` or `load_lora_weights` reads.

        Args:
            folder: created; its files are replaced.
            state: values for the trained parameters by name, such as their moving average; the
                current ones if None.
        """


class AbstractBlank(abc.ABC):
    """A model without weights, of which the memory of a run is planned."""

    settings: AbstractModel
    """What loads it, on the meta device, and reads the configurations of its files alone."""

    def ready(self, model: Any) -> Any:
        """A loaded model that leaves out what needs numbers, such as a comparison of them."""
        return model

    def frozen_parts(self) -> Mapping[str, Sequence[nn.Module]]:
        """What it holds besides its network, by name."""
        return {}

    def saved_by_few_bits(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of frozen weights that `quantization` does without, and of the layer that is
        unpacked for a product, in `dtype`. Activations stay as they are: a layer of few bits keeps
        for its backward pass what a frozen one keeps."""
        return 0, 0


@dataclass(frozen=True, kw_only=True)
class AbstractModel(Ranged, abc.ABC):
    """The settings of a model, as a config writes them."""

    @property
    @abc.abstractmethod
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained (and can be turned off), rather than the network itself."""

    @property
    def continues_adapter(self) -> bool:
        """Whether that adapter begins with values of an earlier run, so that the network without
        it is another policy than the one that training begins with."""
        return False

    @property
    def takes_encodings(self) -> bool:
        """Whether its frozen encoders are not loaded, so that batches must bring what they made of
        the data before."""
        return False

    @property
    def makes(self) -> Literal["images", "responses"] | None:
        """What can be sampled from it while it trains; None where it only scores."""
        return None

    def blank(self) -> AbstractBlank | None:
        """The model without weights; None where no memory can be planned for it."""
        return None

    @property
    def leaves_weights_idle(self) -> bool:
        """Whether some of what trains has no part in the output, and so never a gradient."""
        return False

    def check_sharding(self) -> None:
        """Raise ValueError, with the setting that is in the way, unless its weights can be shared
        out among processes."""
        raise ValueError("it is small, and every process has room for all of it")

    @property
    def tells_users(self) -> bool:
        """Whether it has to know who gave each verdict."""
        return False

    @property
    def own_rates(self) -> Mapping[str, float]:
        """Settings that give a part of the model a learning rate of its own -> that rate."""
        return {}

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for the start of a run: what is trained, and where its weights come from."""

    def policy_fingerprint(self) -> str:
        """Identifies the policy that training begins with, and how it reads its input.

        Raises:
            ModelError: it is known only when the weights are.
        """
        raise ModelError(
            f"{type(self).__name__} tells its policies apart by their weights alone: leave "
            f"reference at auto"
        )

    def reference_settings(self) -> Mapping[str, Any]:
        """All of the model that its values as a reference depend on, by what chooses it.

        Raises:
            ModelError: they are known only when the weights are.
        """
        return {"model (weights, start of the adapter, processor)": self.policy_fingerprint()}

    def tokenizers(self) -> Sequence[Any]:
        """Those that read the captions of image pairs, and cut what is too long; no weights.

        Raises:
            ModelError: they cannot be read.
        """
        return ()

    @property
    @abc.abstractmethod
    def library(self) -> str:
        """Name under which the hub knows what opens an exported model."""

    @property
    def whole_library(self) -> str:
        """The same for the whole model, an adapter merged into it."""
        return self.library

    @property
    def task(self) -> str | None:
        """What the hub calls what the model does; None where it has no name for it."""
        return None

    @property
    def export_note(self) -> str:
        """What else lies next to an exported model, in a sentence; may be empty."""
        return ""

    @abc.abstractmethod
    def usage(self, folder: str) -> str:
        """Lines of Python that open the model exported to `folder`."""

    @abc.abstractmethod
    def next_step(self, run: Path) -> str:
        """What to do with the result of the run in a folder: a sentence, and a command below it."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ModelError for whatever can be known before weights are read."""

    def check_image_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError unless it can train on images of (height, width) pixels."""

    @abc.abstractmethod
    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> AbstractTrainable:
        """Read the weights.

        Args:
            device: where everything goes.
            compute_dtype: in which the loaded model computes, autocasting by itself, for policy and
                reference alike; trained parameters stay in float32.
            reference: what `AbstractTrainable.reference` switches to.
            trainable: False for a model that is only evaluated. Nothing requires grad then, and
                what would train is kept like all that is frozen; it says the same, bit for bit.
            sharder: shares the weights out among processes, each of which reads its own part; given
                only where `check_sharding` has nothing against it.
        """
