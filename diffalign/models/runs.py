"""Runs as models: what one trained, at its end or so far, and what it started from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.errors import ModelError
from diffalign.files import read_json, read_tensors, read_text, sha256_of
from diffalign.models.weights import Stored, stored_in
from diffalign.parsing import parse_yaml

CONFIG = "config.yaml"
FINAL = "final"
_PREFIX, _STATE, _SHARDS = "checkpoint-", "state.json", "shards"
_AVERAGE, _WEIGHTS = "average.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, as the policy that an export of it would write."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder.absolute().parent

    @property
    def file(self) -> Path:
        """The trained parameters by their names in the network: their moving average where the run
        keeps one, since that is what it exports."""
        average = self.folder / _AVERAGE
        return average if average.is_file() else self.folder / _WEIGHTS

    def model(self) -> dict[str, Any]:
        """The settings of the run's model.

        Raises:
            ModelError: see `model_of_run`.
        """
        return model_of_run(self.run)

    def values(self) -> dict[str, Tensor]:
        """The content of the file.

        Raises:
            ModelError: it is damaged.
        """
        self._check()
        try:
            values = read_tensors(self.file, error=ModelError)
        except ModelError as error:
            raise ModelError(f"{error}. Take another checkpoint of the run") from error
        if self.model().get("kind") == "vlm":
            return {name.removeprefix("model."): value for name, value in values.items()}
        return values

    def stored(self) -> dict[str, Stored]:
        """Where the values lie, by the names of the trained parameters.

        Raises:
            ModelError: the file is damaged.
        """
        self._check()
        return stored_in([self.file])

    def _check(self) -> None:
        """Raise ModelError if the file is not the one that was written, or not the whole."""
        if (self.folder / _SHARDS).is_dir():
            raise ModelError(
                f"{self.folder}: was written by processes that share the weights out "
                f"(training.sharding), each its part, and is read by training alone. Take the "
                f"model of the finished run ({FINAL}), or go on with training.sharding=none "
                f"--resume, whose next checkpoint is whole"
            )
        written = self.folder / _STATE
        state = read_json(written, error=ModelError)
        files = state.get("files") if isinstance(state, dict) else None
        if not isinstance(files, dict):  # of a version that wrote no digests
            return
        seal = files.get(self.file.name)
        try:
            digest = sha256_of(self.file)
        except OSError as error:
            raise ModelError(f"{self.file}: cannot be read: {error}") from error
        if not isinstance(seal, dict) or seal.get("sha256") != digest:
            raise ModelError(
                f"{self.file}: has changed since it was written: its SHA-256 differs. Take another "
                f"checkpoint of the run"
            )


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, rather than a model."""
    return (folder / CONFIG).is_file() and not any(
        (folder / name).is_file() for name in ("model_index.json", "config.json")
    )


def checkpoint_at(path: Path) -> RunCheckpoint | None:
    """The checkpoint that a path names: its own folder, or that of a run which has not finished and
    whose newest one it then is. None where it names neither."""
    if (path / _STATE).is_file() and (path / _WEIGHTS).is_file():
        return RunCheckpoint(path)
    if not is_run(path) or (path / FINAL).is_dir():
        return None
    steps = [int(n) for f in path.glob(f"{_PREFIX}*") if (n := f.name[len(_PREFIX) :]).isdecimal()]
    newest = path / f"{_PREFIX}{max(steps, default=0)}"
    return RunCheckpoint(newest) if (newest / _WEIGHTS).is_file() else None


def in_words(path: Path) -> str:
    """A path for people, with the checkpoint that it represents where it does not say so."""
    found = checkpoint_at(path)
    if found is None or found.folder == path:
        return str(path)
    return f"{path} (which has not finished: {found.folder.name}, its newest checkpoint)"


def checkpoint_of(file: Path) -> RunCheckpoint | None:
    """The checkpoint whose trained parameters a file holds; None where it is another file."""
    found = checkpoint_at(file.parent)
    return found if found is not None and file.name in (_AVERAGE, _WEIGHTS) else None


def model_of_run(run: Path) -> dict[str, Any]:
    """The section `model` of a run's config.

    Raises:
        ModelError: there is none, or it does not name the model that the run started from.
    """
    file = run / CONFIG
    if not file.is_file():
        raise ModelError(
            f"{run} has no {CONFIG}, which says what model its checkpoints change: put it there "
            f"again, or leave checkpoints in the folder of their run"
        )
    content = parse_yaml(read_text(file, error=ModelError), file, error=ModelError)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model.get("path"):
        raise ModelError(f"{file}: names no model.path, so what the run started from is unknown")
    return model
