"""Reward models: an encoder of images and prompts, and a head that scores what it sees.

What training writes is a folder that the scorer `trained` reads: `reward.json` with the settings,
`head.safetensors`, and under `encoder` what else was trained, in the layout of its own library. An
encoder that stayed as it was is named and not copied, as a LoRA names its base.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign import config
from diffalign.commands import command
from diffalign.config import MUST_STAY
from diffalign.errors import ModelError, did_you_mean
from diffalign.files import read_json, write_json
from diffalign.models.base import AbstractModel, AbstractTrainable, ReferenceKind
from diffalign.models.devices import send
from diffalign.models.diffusion.export import replacing
from diffalign.models.preference.clip_loading import digest_of, fill, read_state
from diffalign.models.preference.heads.base import AbstractHead, Features
from diffalign.models.sharding import Sharder
from diffalign.ranges import AtLeast, Ranged

REWARD, HEAD, ENCODER = "reward.json", "head.safetensors", "encoder"
"""What an exported reward model consists of."""

Read = Callable[[Sequence[Image], Sequence[str]], dict[str, Tensor]]
"""n images and prompts as the encoder takes them, on the CPU."""
WriteEncoder = Callable[[Path, Mapping[str, Tensor]], None]
"""Writes what was trained of an encoder, by its names, into a folder."""


class AbstractEncoder(nn.Module, abc.ABC):
    """Images and prompts to features; what requires grad in it trains."""

    width: int
    """Of its joint features."""
    has_plain: bool
    """Whether it has a score of its own."""

    @abc.abstractmethod
    def forward(self, **inputs: Tensor) -> Features:
        """Features of what `Read` gave."""


class RewardNetwork(nn.Module):
    """The one module of a reward model, for several processes to share."""

    def __init__(self, encoder: AbstractEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, inputs: Mapping[str, Tensor], users: Tensor | None) -> Tensor:
        """What the head gives for n rows, float32."""
        features = self.encoder(**inputs)
        with torch.autocast(features.joint.device.type, enabled=False):
            found: Tensor = self.head(features, users)
        return found


class RewardModel(AbstractTrainable):
    """A reward model, in training or for scoring."""

    def __init__(
        self,
        *,
        network: RewardNetwork,
        head: AbstractHead,
        read: Read,
        write_encoder: WriteEncoder | None,
        settings: Mapping[str, Any],
        device: torch.device,
        compute_dtype: torch.dtype,
        start: str,
        rates: Mapping[str, float],
        fingerprint: str,
        of_responses: bool = False,
    ) -> None:
        """Assemble a model from loaded parts, all on one device.

        Args:
            network: what requires grad in it is what trains.
            head: settings of its head.
            read: prepares images and prompts.
            write_encoder: None where the encoder does not train.
            settings: of the model, as plain values, for `open_reward`.
            device: where the network is.
            compute_dtype: in which the encoder runs, by autocast unless it is float32.
            start: identifies the encoder as training begins.
            rates: see `AbstractTrainable.learning_rates`.
            fingerprint: see `AbstractTrainable`.
            of_responses: whether it scores responses, and no images.
        """
        self.network: nn.Module = network
        self.of_responses = of_responses
        self.start = start
        self._rates = rates
        self.head = head
        self.device = device
        self.evaluations = 0
        self._unwrapped = network  # `network` itself may be wrapped for several processes
        self._read, self._write_encoder = read, write_encoder
        self._settings = settings
        self._compute_dtype = compute_dtype
        self._fingerprint = fingerprint

    def read(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """n RGB images and their prompts as the network takes them, on its device."""
        inputs = self._read(images, prompts)
        return {name: send(value, self.device) for name, value in inputs.items()}

    def outputs(self, inputs: Mapping[str, Tensor], users: Tensor | None) -> Tensor:
        """What the head gives, float32: scores [n], or what its `sides` takes."""
        reduced = self._compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._compute_dtype, enabled=reduced):
            found: Tensor = self.network(inputs, users)
        self.evaluations += len(found)
        return found

    def to(self, device: torch.device | str) -> None:
        """Move the network, for scoring."""
        self.device = torch.device(device)
        self.network.to(self.device)

    def reference(self) -> AbstractContextManager[None]:
        raise ValueError("a reward model is compared with nothing: set reference to none")

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._unwrapped.named_parameters() if p.requires_grad)

    def learning_rates(self) -> Mapping[str, float]:
        return self._rates

    def fingerprint(self) -> str:
        return self._fingerprint

    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what `open_reward`, and so the scorer `trained`, reads.

        Args:
            folder: replaced as a whole.
            state: values for all trained parameters by name; the current ones if None.
        """
        values = {**self._unwrapped.state_dict(), **(state or {})}
        heads = _below("head.", values)
        with replacing(folder) as partial:
            tensors = {name: v.detach().float().cpu().contiguous() for name, v in heads.items()}
            save_file(tensors, partial / HEAD, metadata={"format": "pt"})
            if self._write_encoder is not None:
                self._write_encoder(partial / ENCODER, _below("encoder.", values))
            write_json(partial / REWARD, {"model": self._settings, "encoder": self.start})


def _below(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class OneTime:
    """In place of a noise process: images are seen as they are, at one time."""

    schedule_length: int = 1


@dataclass(frozen=True, kw_only=True)
class AbstractRewardModel(AbstractModel, abc.ABC):
    """The settings of a reward model."""

    head: AbstractHead
    """What scores the features: `kind: linear`, cosine, pal (a taste for each user), general
    (comparisons without a score)."""

    @property
    def trains_adapter(self) -> bool:
        return False

    @property
    def tells_users(self) -> bool:
        return bool(self.head.known_users)

    @property
    def of_responses(self) -> bool:
        """Whether it scores responses, and no images."""
        return False

    @property
    def library(self) -> str:
        return "diffalign"

    def usage(self, folder: str) -> str:
        if self.of_responses:
            return (
                f"from diffalign.models.preference.response_scorer import ResponseScorer\n\n"
                f'scorer = ResponseScorer("{folder}")'
            )
        user = f', user="{self.head.known_users[0]}"' if self.tells_users else ""
        return (
            f"from diffalign.scorers.trained import Trained\n\n"
            f'scorer = Trained(path="{folder}"{user})'
        )

    def next_step(self, run: Path) -> str:
        scorer = {"scorer.kind": "trained", "scorer.path": run / "final"}
        if self.of_responses:
            made = {"questions.path": "DATA", "synthesis.kind": "self_sampled"}
            ranked = {"synthesis.samples": 4, "synthesis.reward": run / "final"}
            return "Let it rank what a model responds:\n  " + command(
                "synthesise",
                {"model.kind": "vlm", "model.path": "MODEL", **made, **ranked, "output": "PAIRS"},
            )
        if self.head.compares:
            judge = {"scorer.kind": "pairwise", "scorer.judge.kind": "trained"}
            asked = {**judge, "scorer.judge.path": run / "final"}
            return (
                "How often it is right on held-out pairs is held_out/accuracy in metrics.jsonl. It "
                "compares images: let it hold those of each prompt against each other:\n  "
                + command("score", {"images": "IMAGES", **asked})
            )
        if self.tells_users:
            scorer["scorer.user"] = Path(self.head.known_users[0])
        return "Let it score images:\n  " + command("score", {"images": "IMAGES", **scorer})

    def check_sharding(self) -> None:
        raise ValueError("every process holds the whole of a reward model")

    def noising(self) -> OneTime:
        """What image pairs ask of a model: nothing here is noised."""
        return OneTime()

    @abc.abstractmethod
    def reopened(self, folder: Path) -> AbstractRewardModel:
        """The same with what training wrote of its encoder.

        Args:
            folder: `encoder` of an exported model.
        """

    @abc.abstractmethod
    def load(
        self,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool = True,
        sharder: Sharder | None = None,
    ) -> RewardModel:
        """See `AbstractModel.load`."""

    def assembled(
        self,
        encoder: AbstractEncoder,
        *,
        read: Read,
        write_encoder: WriteEncoder | None,
        start: str,
        rates: Mapping[str, float],
        device: torch.device,
        compute_dtype: torch.dtype,
        reference: ReferenceKind,
        trainable: bool,
    ) -> RewardModel:
        """A model of a loaded encoder.

        Args:
            encoder, read, write_encoder: see `RewardModel`.
            start: identifies the encoder's weights and what of it trains.
            rates: of its parameters that have their own, by their names in it.
            device, compute_dtype, reference, trainable: as `load` got them.

        Raises:
            ModelError: a reference is asked for, or the head needs what the encoder has not.
        """
        if reference != "none":
            raise ModelError(
                f"a reward model has no reference, and reference is {reference}: use none"
            )
        if self.head.needs_plain and not encoder.has_plain:
            raise ModelError(
                f"head: {self.head.describe()} is a CLIP's own score, and this encoder has none: "
                f"take linear"
            )
        network = RewardNetwork(encoder, self.head.build(encoder.width)).to(device)
        if not trainable:
            network.requires_grad_(False).eval()
        elif not any(parameter.requires_grad for parameter in network.parameters()):
            raise ModelError(
                f"nothing trains: the encoder is frozen, and {self.head.describe()} has no weights "
                f"of its own. Train a part of the encoder, or take another head"
            )
        parts = [start, repr(self.head)]
        return RewardModel(
            network=network.train(trainable),
            head=self.head,
            read=read,
            write_encoder=write_encoder,
            settings=config.to_dict(self),
            device=device,
            compute_dtype=compute_dtype,
            start=start,
            rates={f"encoder.{name}": rate for name, rate in rates.items()},
            fingerprint=hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest(),
            of_responses=self.of_responses,
        )


def exported(path: Path) -> Path:
    """The folder of an exported reward model: of a run, or itself.

    Raises:
        ModelError: there is none.
    """
    for folder in (path, path / "final"):
        if (folder / REWARD).is_file():
            return folder
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such folder of a trained reward model")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise ModelError(
        f"{path} is no trained reward model: it has no {REWARD} (it holds {found}). Train one with "
        f"model.kind clip_reward or vlm_reward and name its run; a CLIP is read by scorer.kind "
        f"pickscore, a step-aware model by step_aware"
    )


def settings_of(folder: Path) -> AbstractRewardModel:
    """The settings of an exported model, with what was trained of its encoder.

    Raises:
        ModelError: the file is damaged, or says another kind of model.
    """
    content = read_json(folder / REWARD, error=ModelError)
    tree = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tree, dict):
        raise ModelError(f"{folder / REWARD} holds no settings of a model")
    settings = config.from_dict(AbstractModel, tree, place=str(folder / REWARD))  # type: ignore[type-abstract]
    if not isinstance(settings, AbstractRewardModel):
        raise ModelError(f"{folder / REWARD} is of a {tree.get('kind')}, which is no reward model")
    encoder = folder / ENCODER
    return settings.reopened(encoder) if encoder.is_dir() else settings


def open_reward(
    folder: Path, *, device: torch.device | str = "cpu", of_responses: bool = False
) -> RewardModel:
    """A trained reward model, for scoring.

    Args:
        folder: from `exported`.
        device: where it goes.
        of_responses: whether responses are to be scored, and not images.

    Raises:
        ModelError: a part is missing or damaged, or the encoder is another one by now; it scores
            the other.
    """
    settings = settings_of(folder)
    if settings.of_responses != of_responses:
        scored, wanted = ("images", "responses")[:: 1 if of_responses else -1]
        raise ModelError(
            f"{folder} scores {scored}, and it is to score {wanted}: train model.kind vlm_reward "
            f"with model.candidates {wanted}"
        )
    model = settings.load(
        device=torch.device(device),
        compute_dtype=torch.float32,
        reference="none",
        trainable=False,
    )
    start = read_json(folder / REWARD, error=ModelError).get("encoder")
    if not (folder / ENCODER).is_dir() and model.start != start:
        raise ModelError(
            f"{folder} is a head on an encoder that it names and does not hold, and what lies "
            f"there now is another one (fingerprint {model.start}, then {start}): put "
            f"the model back, or train again"
        )
    head = model.network.get_submodule("head")
    fill(head, read_state(folder / HEAD), source=folder / HEAD)
    return model


def check_user(user: str | None, head: AbstractHead, path: str) -> None:
    """Raise ModelError unless a user is named exactly where a head tells tastes apart."""
    known = head.known_users
    if (user is None) == bool(known) or (known and user not in known):
        said = "no users" if not known else f"the users {', '.join(known[:8])}"
        hint = did_you_mean(user, known) if known and user else ""
        raise ModelError(f"user is {user}, and {path} knows {said}.{hint}")


@dataclass(frozen=True, kw_only=True)
class OwnReward(Ranged):
    """A reward model of one's own, as the settings of who scores or compares images name it."""

    path: str = field(metadata=MUST_STAY)
    """Folder of a run with `model.kind: clip_reward` or `vlm_reward`, or its `final`."""
    user: str | None = None
    """Whose taste counts, where the model tells several apart (`head.kind: pal`)."""
    images_per_batch: Annotated[int, AtLeast(1)] = 32
    """Images in one pass of the network, which bounds its memory."""

    def to(self, device: torch.device | str) -> Any:
        """Move its weights; returns the same settings."""
        self._model.to(device)
        return self

    def _outputs(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """See `RewardModel.outputs`; all in one pass."""
        users = None if self.user is None else [self.user] * len(images)
        rows = None if users is None else self._model.head.rows_of(users)
        moved = None if rows is None else send(rows, self._model.device)
        return self._model.outputs(self._model.read(images, prompts), moved)

    @cached_property
    def _identity(self) -> str:
        """Tells model and user from any other."""
        folder = exported(Path(self.path).expanduser())
        return content_of(folder) + ("" if self.user is None else f"-{self.user}")

    @cached_property
    def _model(self) -> RewardModel:
        model = open_reward(exported(Path(self.path).expanduser()))
        self._check_head(model.head)
        check_user(self.user, model.head, self.path)
        return model

    def _check_head(self, head: AbstractHead) -> None:
        """Raise ModelError where a head does not say what is asked of it."""


def content_of(folder: Path) -> str:
    """Tells an exported model from any other; reads its files whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    kept = [path for path, name in zip(files, names, strict=True) if not name.endswith(".md")]
    return digest_of(*kept)
