"""What cannot be seen in the modules of a vision-language model: how its layers attend, what its
tower returns, what becomes of its logits.

Families agree in most of it, and what they agree in is here. A file next to this one, called like
a `model_type`, says what that family does otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from diffalign import components

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""Kinds of layers in which a token knows of others by the mask alone."""

_IN_ONE_ROW = ("pixtral",)
"""Towers that return the patches of all images as one row of a batch."""


class AbstractFamily(ABC):
    """What a family does, given the configuration of a model of it."""

    further_targets: ClassVar[tuple[str, ...]] = ()
    """Layers of its language model that get an adapter besides the projections of attention and
    MLP."""
    sees_ahead: ClassVar[bool] = False
    """Whether some of its tokens see some that come after them; `blocks` tells which."""
    blocks_within_window: ClassVar[bool] = True
    """Whether tokens of a block see each other within the window of their layer alone."""
    masks_go_around: ClassVar[bool] = False
    """Whether its model takes no mask of four dimensions for its language model, which does."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.text = config.get_text_config()

    @property
    @abstractmethod
    def name(self) -> str:
        """As people write it."""

    def blocks(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Blocks of tokens that see each other, before and after; None where there are none.

        Args:
            inputs: per token, [n, L] each, such as `token_type_ids`.

        Returns:
            Int64 [n, L]: the number of a token's block within its row, -1 where it has none.
        """
        return None

    def token_inputs(
        self, further: Mapping[str, Tensor], response_mask: Tensor
    ) -> Mapping[str, Tensor]:
        """What the model takes per token, from what its processor said of a prompt.

        Args:
            further: outputs of the processor, [n, L] each; a response has what text has.
            response_mask: bool [n, L], True for tokens of the response.
        """
        return further

    def processor(self, processor: Any) -> Any:
        """The processor of the model, made to leave the text of a chat template as it is.

        Args:
            processor: as its files have it; may be changed in place.
        """
        return processor

    def repaired(self, model: Any) -> Any:
        """A model that was read, with faults of transformers worked around in place."""
        return model

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers of the language model; empty where all are alike and it does not say."""
        names = ("layer_types", "layers_block_type")
        named = [kind for name in names for kind in getattr(self.text, name, None) or ()]
        return tuple(dict.fromkeys(named))

    @property
    def window(self) -> int | None:
        """How many tokens a layer with a window sees, its own included; None without a window."""
        if getattr(self.text, "use_sliding_window", True) is False:
            return None
        return getattr(self.text, "sliding_window", None)

    @property
    def chunk(self) -> int | None:
        """How long the pieces are into which layers of chunks cut a row."""
        return getattr(self.text, "attention_chunk_size", None)

    @property
    def longest_branched(self) -> int | None:
        """Tokens that a row with branches may have at most; None for any number."""
        return None

    @property
    def softcap(self) -> float | None:
        """Logits x become c tanh(x / c) with this c; None leaves them."""
        return getattr(self.text, "final_logit_softcapping", None)

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of the tower that the projector takes; empty where it takes the output."""
        found = getattr(self.config, "vision_feature_layer", None)
        return () if found is None else (found,) if isinstance(found, int) else tuple(found)

    @property
    def features_axis(self) -> int:
        """Along which features of several images follow each other."""
        tower = getattr(self.config, "vision_config", None)
        return int(getattr(tower, "model_type", None) in _IN_ONE_ROW)


def family_of(config: PretrainedConfig) -> AbstractFamily:
    """The family of a model, by its configuration."""
    # transformers 4.57 gives the text part's `model_type` on the instance.
    return _class_of(type(config).model_type)(config)


@cache
def _class_of(model_type: str) -> type[AbstractFamily]:
    known = components.kinds(AbstractFamily)
    kind = model_type if model_type in known else "plain"
    return components.find(AbstractFamily, kind)  # type: ignore[type-abstract]
