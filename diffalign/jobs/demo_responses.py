"""`diffalign demo --vlm`: the branch for responses on the embedded playground.

Train the tiny LLaVA with mDPO on preferences between its own descriptions, let base and aligned
model describe held-out scenes and answer questions about them, and hold both against the truth.
Stopped anywhere, the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table

from diffalign import config as configs
from diffalign.benchmarks.report import Figure
from diffalign.files import write_image, write_json, writing
from diffalign.generation.local_model import WritesResponses
from diffalign.imaging.response_grid import Passage, Response, ResponseRow, render_responses
from diffalign.jobs.demo import train_or_go_on
from diffalign.models.devices import choose_device
from diffalign.models.vlm.answering import Answerer
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.playground.multi_object_scenes import kind_named, kinds_in, sentences_of
from diffalign.playground.response_quality import (
    describe,
    evaluate_responses,
    held_out_multi_object_scenes,
)
from diffalign.playground.scenes import Scene, render
from diffalign.ranges import AtLeast, Ranged
from diffalign.training.config import RunConfig

SHOWN = (
    *("chair_s", "chair_i", "recall", "repetition_s", "mean_length"),
    *("pope_accuracy", "pope_yes_ratio"),
)
"""Figures of the table, of those that are measured."""
_AT_ONCE = 64
"""Questions in a batch."""
_LOOKED_THROUGH = 64
"""Scenes that the image is chosen from."""
_WRONG, _RIGHT = 4, 2


@dataclass(frozen=True, kw_only=True)
class ResponsesDemoConfig(Ranged):
    """Config, model and folder of the demo of responses."""

    config: Path = Path("configs/playground/responses/mdpo.yaml")
    """The training run."""
    output: Path = Path("runs/demo_vlm")
    """The run folder; figures and the image go to `evaluation/` below it."""
    overrides: tuple[str, ...] = ()
    """For the training run, as `key.path=value`."""
    scenes: Annotated[int, AtLeast(2, "one has no interval")] = 150
    """Held-out scenes that both models are asked about."""


def run(demo: ResponsesDemoConfig) -> None:
    """Align, describe, measure; ends by naming the image and the next command."""
    started = time.monotonic()
    console = Console(highlight=False)
    run_config = configs.load(RunConfig, demo.config, [*demo.overrides, f"output={demo.output}"])

    console.rule("1 of 2  Align the tiny LLaVA with preferences between its own responses")
    if not train_or_go_on(run_config, console):
        console.print("The same command goes on from here")
        return

    console.rule("2 of 2  Hold what both say of unseen scenes against the truth")
    settings = run_config.model
    assert isinstance(settings, VLM), "the config trains responses"
    models = {"base": answerer(settings, None), "aligned": answerer(settings, demo.output)}
    scenes = held_out_multi_object_scenes(demo.scenes)
    figures = {name: evaluate_responses(model, scenes) for name, model in models.items()}
    folder = demo.output / "evaluation"
    with writing(folder):
        content = {name: {k: asdict(f) for k, f in of.items()} for name, of in figures.items()}
        write_json(folder / "responses.json", content)
    _render(models, folder / "descriptions.png")
    console.print(_table(figures))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.rule(f"Done in {minutes}:{seconds:02} min")
    console.print(
        f"  descriptions  {folder / 'descriptions.png'}\n"
        f"  figures       {folder / 'responses.json'}\n"
        f"  model         {demo.output / 'final'}\n\n"
        f"Next, the same method on LLaVA-1.5-7B (checks everything, trains nothing):\n"
        f"  diffalign train configs/mdpo/llava15_7b.yaml --dry-run",
        markup=False,
        soft_wrap=True,
    )


def answerer(settings: VLM, run: Path | None) -> WritesResponses:
    """Writes responses with `opened(settings, run)`."""
    return Answerer(opened(settings, run), rows_at_once=_AT_ONCE)


def opened(settings: VLM, run: Path | None) -> VisionLanguageModel:
    """The model that a run with these settings made, or the one that it started from."""
    if run is None:
        if settings.lora is not None and settings.lora.start is None:
            settings = replace(settings, lora=None)
    elif settings.lora is None:
        settings = replace(settings, path=str(run / "final"))
    else:
        settings = replace(settings, lora=replace(settings.lora, start=run))
    return settings.load(
        device=choose_device("auto"),
        compute_dtype=torch.float32,
        reference="none",
        trainable=False,
    )


def _table(figures: Mapping[str, Mapping[str, Figure]]) -> Table:
    table = Table("", *figures, box=None)
    for name in SHOWN:
        cells = [of[name] for of in figures.values()]
        table.add_row(cells[0].label, *(cell.spelt for cell in cells))
    return table


def _render(models: Mapping[str, WritesResponses], path: Path) -> None:
    """Scenes with what each model says of them, most of them such as the first model gets wrong."""
    scenes = held_out_multi_object_scenes(_LOOKED_THROUGH)
    texts = [describe(model, scenes) for model in models.values()]
    rows = [
        ResponseRow(image=render(scene), responses=[_judged(text, scene) for text in said])
        for scene, *said in zip(scenes, *texts, strict=True)
    ]
    wrong: list[ResponseRow] = []
    right: list[ResponseRow] = []
    for row in rows:
        (wrong if any(passage.wrong for passage in row.responses[0].passages) else right).append(
            row
        )
    title = f"The first {_WRONG} unseen scenes that the base gets wrong, the first {_RIGHT} others"
    with writing(path):
        rows = wrong[:_WRONG] + right[:_RIGHT]
        write_image(path, render_responses(rows, list(models), title=title))


def _judged(response: str, scene: Scene) -> Response:
    """Which sentences name what is not there, and what none names."""
    sentences = sentences_of(response)
    kinds = [kind_named(text) for text in sentences]
    shown = kinds_in(scene)
    missed = [str(kind) for kind in shown if kind not in kinds]
    return Response(
        passages=[
            Passage(text=text, wrong=kind not in shown)
            for text, kind in zip(sentences, kinds, strict=True)
        ],
        note=f"not mentioned: {', '.join(missed)}" if missed else "",
    )
