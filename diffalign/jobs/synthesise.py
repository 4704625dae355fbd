"""`diffalign synthesise`: preference data that a vision-language model helps to make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.markup import escape

from diffalign import blocks, components, sessions
from diffalign import config as configs
from diffalign.commands import command
from diffalign.console import silence_libraries
from diffalign.data.responses.questions import QuestionConfig, Questions, Unmade, open_questions
from diffalign.engines.base import Sharing, do_blocks
from diffalign.errors import ConfigError, DataError
from diffalign.files import writing
from diffalign.generation.writing import Writer
from diffalign.models.base import AbstractModel
from diffalign.models.devices import DTYPES, Precision, choose_device
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.ranges import AtLeast, Ranged
from diffalign.synthesis.base import AbstractSynthesis, Context, ImageStore, Made
from diffalign.synthesis.journal import Journal, MadePlan, of_failed
from diffalign.synthesis.output import Format, write_pairs, write_skipped

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


def run(config: SynthesiseConfig, sharing: Sharing | None = None) -> None:
    """Make what is missing, and write the data set.

    Args:
        config: what is made of which questions.
        sharing: which processes do it; None is this one.

    Raises:
        BusyError: another command writes in the folder.
        ConfigError: the folder holds what was made under other settings.
        DataError: there are no questions, or nothing could be made of any.
        ModelError: the model cannot do what the method asks.
    """
    silence_libraries()
    console = Console(highlight=False)
    sharing = sharing or Sharing()
    model = _model(config)
    model.check()
    config.synthesis.check()
    sharing.engine.check(config.device)
    with sessions.held(config.output, shard=sharing.shard) as session:
        _synthesise(config, model, console, session, sharing)


def _model(config: SynthesiseConfig) -> VLM:
    if not isinstance(config.model, VLM):
        raise ConfigError("model.kind must be vlm: responses about images are written by one")
    return config.model


def plan_of(config: SynthesiseConfig) -> MadePlan:
    """What is made of the questions of a config, as blocks; no weights are read."""
    questions = open_questions(config.questions)
    dtype = _dtype_name(config)
    journal = Journal(config.output, _what_decides(config, _model(config), questions, dtype))
    return MadePlan(
        journal,
        questions,
        config.output,
        batch_size=config.batch_size,
        device=config.device,
        open_maker=lambda device: config.synthesis.open(_bench(config, questions, dtype, device)),
    )


def _synthesise(
    config: SynthesiseConfig,
    model: VLM,
    console: Console,
    session: sessions.Session,
    sharing: Sharing,
) -> None:
    make = blocks.Recipe(plan_of, config)

    def keep_settings() -> None:
        with writing(config.output):
            configs.save(config, config.output / "synthesise.yaml")

    plan = session.begin(make, first=keep_settings)
    questions = open_questions(config.questions)
    _print_plan(config, model, questions, console)
    if not do_blocks(session, plan, make, sharing, console):
        return
    journal = make().journal  # others may have merged before
    failed = {each["id"]: of_failed(each) for each in session.failed}
    ids = [item.sample_id for item in questions]
    _finish(config, [failed.get(i) or journal[i] for i in ids], console)


def _bench(
    config: SynthesiseConfig, questions: Questions, dtype: Precision, device: str | None
) -> Context:
    compute_dtype = DTYPES[dtype]
    model = config.model.load(
        device=choose_device(device or config.device),
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
