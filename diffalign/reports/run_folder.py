"""What the folder of a run holds, read without a model and without harm: of a run that is finished,
goes on, was stopped, or lacks parts.

Whatever cannot be read is left out and named in `problems`; a page shows the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import DataError, DiffalignError
from diffalign.files import read_json
from diffalign.models.runs import CONFIG, FINAL, is_run
from diffalign.parsing import parse_yaml
from diffalign.processes import writer_of
from diffalign.training.checkpoint import checkpoints_in

Row = Mapping[str, float]
Status = Literal["finished", "running", "stopped", "not started"]

_PREVIEWS = "previews"


@dataclass(frozen=True)
class Preview:
    """What the policy made of one prompt, step by step."""

    caption: str
    question: Path | None
    """The image that a question is about."""
    frames: Mapping[int, Path]
    """Step -> image or text."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run as its folder tells it."""

    path: Path
    problems: list[str] = field(default_factory=list)
    """Sentences on files that are there and cannot be read."""

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """The run in a folder.

        Raises:
            DataError: it is none.
        """
        if not is_run(path):
            raise DataError(
                f"{path}: is not the folder of a training run (it has no {CONFIG}): give the "
                f"`output` of a diffalign train"
            )
        return cls(path=path)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @cached_property
    def config_text(self) -> str:
        """`config.yaml` as it is."""
        return self._text(self.path / CONFIG)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.yaml` as plain values; empty where it cannot be read."""
        try:
            found = parse_yaml(self.config_text, self.path / CONFIG)
        except DiffalignError as error:
            self.problems.append(str(error))
            return {}
        return found if isinstance(found, Mapping) else {}

    def setting(self, key: str) -> Any:
        """A value of the config by its dotted key; None where there is none."""
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    @cached_property
    def rows(self) -> Sequence[Row]:
        """Rows of `metrics.jsonl`, by rising step."""
        return self._rows("metrics.jsonl")

    @cached_property
    def timing(self) -> Sequence[Row]:
        """Rows of `timing.jsonl`."""
        return self._rows("timing.jsonl")

    @cached_property
    def verdicts(self) -> Sequence[Mapping[str, Any]]:
        """Lines of `health.jsonl`: `step`, `verdict`, `says`, `figures`."""
        return [line for line in self._lines("health.jsonl") if "says" in line]

    @property
    def step(self) -> int:
        """The last one that figures tell of."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def steps(self) -> int | None:
        """How many the config asks for."""
        found = self.setting("training.optimizer_steps")
        return found if isinstance(found, int) else None

    @property
    def status(self) -> Status:
        """Whether the run goes on."""
        if writer_of(self.path) is not None:
            return "running"
        if (self.path / FINAL).is_dir():
            return "finished"
        return "stopped" if self.rows else "not started"

    @property
    def checkpoints(self) -> Sequence[Path]:
        """Oldest first."""
        return checkpoints_in(self.path)

    def last(self, name: str) -> float | None:
        """The latest value of a figure that is finite."""
        values = (row[name] for row in reversed(self.rows) if name in row)
        return next((value for value in values if math.isfinite(value)), None)

    @property
    def figures(self) -> Sequence[str]:
        """Names of all figures, in the order in which they are first told."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in ("step", "samples")]

    @property
    def writes_responses(self) -> bool:
        """Whether the model is a vision-language model."""
        return "responses" in self.config and self.config["responses"] is not None

    @cached_property
    def previews(self) -> Sequence[Preview]:
        """What `previews/` holds, one a prompt."""
        folder = self.path / _PREVIEWS
        subjects = self._json(folder / "previews.json")
        captions = subjects.get("captions", []) if isinstance(subjects, Mapping) else []
        found = []
        for number, caption in enumerate(captions):
            frames = {
                int(file.name.split("-")[1]): file
                for suffix in ("png", "txt")
                for file in sorted(folder.glob(f"step-*-{number}.{suffix}"))
                if file.name.split("-")[1].isdecimal()
            }
            question = folder / f"question-{number}.png"
            if frames:
                found.append(
                    Preview(
                        str(caption),
                        question if question.is_file() else None,
                        dict(sorted(frames.items())),
                    )
                )
        return found

    @property
    def rounds(self) -> Sequence[Path]:
        """Folders of the rounds of an online run, oldest first."""
        return [path for path in sorted(self.path.glob("rounds/round-*")) if path.is_dir()]

    @cached_property
    def results(self) -> Mapping[Path, Mapping[str, Any]]:
        """JSON files of comparisons and benchmarks in the folder, or in a folder of it."""
        found = {}
        for file in sorted([*self.path.glob("*.json"), *self.path.glob("*/*.json")]):
            if file.parent.name.startswith((".", "checkpoint-")) or file.name.startswith("."):
                continue
            if file.parent.name in (FINAL, _PREVIEWS, "rounds"):
                continue
            content = self._json(file)
            if isinstance(content, Mapping) and (
                "comparisons" in content or "benchmark" in content or figures_of_models(content)
            ):
                found[file] = content
        return found

    @cached_property
    def best_checkpoint(self) -> Mapping[str, Any]:
        """What `diffalign best-checkpoint` wrote; empty where it was not asked."""
        found = self._json(self.path / "checkpoints" / "checkpoints.json")
        return found if isinstance(found, Mapping) else {}

    def _text(self, file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        except OSError as error:
            self.problems.append(f"{file}: cannot be read: {error}")
            return ""

    def _json(self, file: Path) -> Any:
        if not file.is_file():
            return None
        try:
            return read_json(file)
        except DataError as error:
            self.problems.append(str(error))
            return None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Objects of a file of JSON lines; the last one may be in the middle of being written."""
        text = self._text(self.path / name)
        found, bad = [], 0
        for line in text[: text.rfind("\n") + 1].split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                found.append(row)
            else:
                bad += 1
        if bad:
            self.problems.append(f"{self.path / name}: {bad} lines are no JSON objects, left out")
        return found

    def _rows(self, name: str) -> list[Row]:
        rows = [
            {
                key: float(value)
                for key, value in line.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            for line in self._lines(name)
        ]
        return sorted((row for row in rows if "step" in row), key=lambda row: row["step"])


def figures_of_models(content: Mapping[str, Any]) -> bool:
    """Whether JSON holds labelled figures by model and name, as the demo of responses writes."""
    return bool(content) and all(
        isinstance(of, Mapping)
        and of
        and all(isinstance(f, Mapping) and {"label", "value"} <= f.keys() for f in of.values())
        for of in content.values()
    )


def runs_below(folder: Path, *, deepest: int = 3) -> list[Path]:
    """Folders of runs in a folder, itself included, by name; those within runs are none."""
    if is_run(folder):
        return [folder]
    if deepest == 0:
        return []
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
    return [
        run
        for path in inner
        if not path.name.startswith(".") and not path.is_symlink()
        for run in runs_below(path, deepest=deepest - 1)
    ]
