"""`diffalign synthesise`: preference data that a vision-language model helps to make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.markup import escape

from diffalign import components
from diffalign import config as configs
from diffalign.batching import each_or_error
from diffalign.commands import command
from diffalign.console import progress, silence_libraries
from diffalign.errors import ConfigError, DataError, DiffalignError
from diffalign.files import writing
from diffalign.models.base import AbstractModel
from diffalign.models.devices import DTYPES, Precision, choose_device
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.processes import only_writer
from diffalign.ranges import AtLeast, Ranged
from diffalign.synthesis.base import (
    AbstractSynthesis,
    Context,
    ImageStore,
    Made,
    Maker,
    Question,
    Unmade,
)
from diffalign.synthesis.journal import FAILED, Journal
from diffalign.synthesis.output import Format, write_pairs, write_skipped
from diffalign.synthesis.questions import QuestionConfig, Questions, open_questions
from diffalign.synthesis.writing import Writer

_FAILURES_IN_A_ROW = 16
_LISTED = 5
_TRAINED_BY = {"trl": "dpo"}
"""Folders of configs by the form of what is made, where the two differ in name."""


@dataclass(frozen=True, kw_only=True)
class SynthesiseConfig(Ranged):
    """Which questions, which model, what is made of them, and where it goes."""

    model: AbstractModel
    """Of kind vlm; the one that will be trained, as a rule. Nothing of it trains here."""
    questions: QuestionConfig
    """Images, prompts, and the responses that will be chosen."""
    synthesis: AbstractSynthesis
    """The method: re_align, mia_dpo, bdhs or self_sampled."""
    output: Path
    """Folder for the data and its new images; what it already holds is completed."""
    format: Format = "jsonl"
    """jsonl names images where they lie; parquet holds them, and can be moved or uploaded."""
    seed: int = 0
    """The seed: rows of a question depend on it and the id of the question alone."""
    batch_size: Annotated[int, AtLeast(1)] = 8
    """Questions, and responses, at once; changes nothing but speed, memory and float rounding."""
    dtype: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """In which the model computes; auto is bf16 on a GPU and float32 elsewhere."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""


def run(config: SynthesiseConfig) -> None:
    """Make what is missing, and write the data set.

    Raises:
        BusyError: another process writes in the folder.
        ConfigError: the folder holds what was made under other settings.
        DataError: there are no questions, or nothing could be made of any.
        ModelError: the model cannot do what the method asks.
    """
    silence_libraries()
    console = Console(highlight=False)
    if not isinstance(config.model, VLM):
        raise ConfigError("model.kind must be vlm: responses about images are written by one")
    config.model.check()
    config.synthesis.check()
    with only_writer(config.output):
        _synthesise(config, config.model, console)


def _synthesise(config: SynthesiseConfig, model: VLM, console: Console) -> None:
    questions = open_questions(config.questions)
    _print_plan(config, model, questions, console)
    dtype = _dtype_name(config)
    journal = Journal(config.output, _what_decides(config, model, questions, dtype))
    with writing(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
        configs.save(config, config.output / "synthesise.yaml")
    ids = _make_missing(config, questions, journal, dtype, console)
    _finish(config, [journal[sample_id] for sample_id in ids], console)


def _make_missing(
    config: SynthesiseConfig,
    questions: Questions,
    journal: Journal,
    dtype: Precision,
    console: Console,
) -> list[str]:
    """Complete the journal; gives the ids of all questions in order."""
    maker: Maker | None = None
    ids: list[str] = []
    failures = 0
    with progress(console, "synthesise", len(questions), unit="questions") as advance:
        for start in range(0, len(questions), config.batch_size):
            batch = questions[start : start + config.batch_size]
            ids += [item.sample_id for item in batch]
            if any(item.sample_id not in journal for item in batch):
                if maker is None:
                    maker = config.synthesis.open(_bench(config, questions, dtype))
                results, failed = _make(maker, batch)
                failures = failures + failed if failed == len(batch) else failed
                if failures >= _FAILURES_IN_A_ROW:
                    raise DiffalignError(
                        f"{failures} questions failed one after the other, the last with: "
                        f"{results[-1]}. What was made before is kept"
                    )
                journal.add(results)
            advance(len(batch))
    return ids


def _make(maker: Maker, batch: Sequence[Question | Unmade]) -> tuple[list[Made | Unmade], int]:
    """The result of every item of a batch, and how many failed as nobody expected."""
    asked = [item for item in batch if isinstance(item, Question)]
    results: dict[str, Made | Unmade] = {
        item.sample_id: item for item in batch if isinstance(item, Unmade)
    }
    failed = 0
    for question, result in each_or_error(maker, asked) if asked else ():
        if isinstance(result, DiffalignError):
            raise result
        if isinstance(result, Exception):
            failed += 1
            detail = f"{type(result).__name__}: {result}"
            result = Unmade(sample_id=question.sample_id, reason=FAILED, detail=detail)
        results[question.sample_id] = result
    return [results[item.sample_id] for item in batch], failed


def _bench(config: SynthesiseConfig, questions: Questions, dtype: Precision) -> Context:
    compute_dtype = DTYPES[dtype]
    model = config.model.load(
        device=choose_device(config.device),
        compute_dtype=compute_dtype,
        reference="none",
        trainable=False,
    )
    assert isinstance(model, VisionLanguageModel)
    return Context(
        writer=Writer(model, batch_size=config.batch_size),
        questions=questions,
        images=ImageStore(config.output),
        folder=config.output,
        seed=config.seed,
        max_pixels=config.questions.max_pixels,
    )


def _finish(config: SynthesiseConfig, lines: Sequence[Made | Unmade], console: Console) -> None:
    """Write the data set and the list of what could not be made."""
    method = config.synthesis
    pairs = method.pairs([line for line in lines if isinstance(line, Made)], config.output)
    made = [row for row in pairs if isinstance(row, Made)]
    unmade = [row for row in (*lines, *pairs) if isinstance(row, Unmade)]
    skipped = write_skipped(config.output, unmade)
    for reason, count in Counter(row.reason for row in unmade).most_common():
        examples = [row for row in unmade if row.reason == reason][:_LISTED]
        listed = ", ".join(f"{row.sample_id} ({row.detail})" for row in examples)
        console.print(f"[yellow]{count} {escape(reason)}[/]: {escape(listed)}", soft_wrap=True)
    if not made:
        raise DataError(
            f"nothing could be made of {len(lines)} questions; {skipped} lists why, question by "
            f"question"
        )
    path = write_pairs(
        config.output, made, format=config.format, image_columns=method.image_columns
    )
    console.print(
        f"[green]Done:[/green] {escape(str(path))}: {len(made)} pairs of {len(lines)} questions; "
        f"{len(unmade)} skipped, listed in {escape(str(skipped))}",
        soft_wrap=True,
    )
    example = f"configs/{_TRAINED_BY.get(method.form, method.form)}/llava15_7b.yaml"
    settings = {
        "responses.path": path,
        "responses.kind": method.form,
        **{f"model.{name}": getattr(config.model, name) for name in ("path", "revision")},
    }
    console.print(
        f"Next:\n  {command('train', settings, config=example, options=['--dry-run'])}",
        markup=False,
        soft_wrap=True,
    )


def _print_plan(
    config: SynthesiseConfig, model: VLM, questions: Questions, console: Console
) -> None:
    adapter = f" with {model.lora.start}" if model.lora and model.lora.start else ""
    kind = components.kind_of(config.synthesis)
    tools = "".join(f"; {part}: {tool}" for part, tool in config.synthesis.tools().items())
    for line in (
        f"[bold]synthesise {kind}[/bold]{escape(tools)}",
        f"questions: {len(questions)}, {escape(questions.summary)}",
        f"model: {escape(model.path + adapter)}",
    ):
        console.print(line, soft_wrap=True)


def _dtype_name(config: SynthesiseConfig) -> Precision:
    if config.dtype != "auto":
        return config.dtype
    return "bf16" if choose_device(config.device).type == "cuda" else "float32"


def _what_decides(
    config: SynthesiseConfig, model: VLM, questions: Questions, dtype: Precision
) -> dict[str, Any]:
    """All that a line of the journal depends on, but for float rounding."""
    synthesis = configs.to_dict(config.synthesis)
    asked = configs.to_dict(config.questions)
    del asked["path"]  # its fingerprint stays where the data moves
    return {
        "synthesis": {k: v for k, v in synthesis.items() if k not in config.synthesis.later},
        "tools": dict(config.synthesis.tools()),
        "model": model.policy_fingerprint(),
        "questions": asked,
        "fingerprint": questions.fingerprint,
        "seed": config.seed,
        "dtype": dtype,
    }
