"""Asking for a score: prompts that tell it, on the playground; figures in docs/results.md.

    .venv/bin/python scripts/score_tags.py            # some 5 minutes on one core
    .venv/bin/python scripts/score_tags.py --trial    # does it run? changes no page

The oracle scores the images of assets/playground/preferences, configs/playground/score_tags.yaml
trains on both images of every pair, each under a prompt that tells its score, and base and trained
model then sample the held-out prompts three times: asked for the highest score, for the lowest, and
as they are. What is there already is taken as it is.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from compare_methods import PAGE, SAMPLER, SEEDS, TRIAL
from pages import fill
from PIL import Image

from diffalign import config
from diffalign.comparison.compare import compare_scores
from diffalign.comparison.report import percent, percent_interval
from diffalign.generation.manifest import read_manifest
from diffalign.generation.prompts import PromptsConfig
from diffalign.jobs import generate, score, train
from diffalign.playground.models import playground_model_path
from diffalign.playground.oracle import PlaygroundOracle, fidelity, read_objects
from diffalign.playground.scenes import held_out_prompts
from diffalign.training.config import RunConfig

CONFIG = Path("configs/playground/score_tags.yaml")

Scores = Mapping[tuple[str, int], float]
"""(Prompt without a tag, seed) -> fidelity to it."""


def trained(folder: Path, *more: str) -> RunConfig:
    """The run; unless they are there, the scores first."""
    scores, output = folder / "scores", folder / "run"
    data = score.DataToScore(path="assets/playground/preferences")
    score.run(score.ScoreConfig(data=data, scorer=PlaygroundOracle(), output=scores))
    file = scores / "oracle.parquet"
    overrides = [f"output={output}", f"data.scores.columns.oracle.file={file}", *more]
    run = config.load(RunConfig, CONFIG, overrides)
    if not (output / "final").is_dir():
        train.run(run)
    return run


def asked(run: RunConfig, folder: Path, *, prompts: int | None) -> dict[tuple[str, str], Scores]:
    """Model and what it is asked for -> fidelity of its images."""
    assert run.data is not None and run.data.scores.tag is not None
    tag, plain = run.data.scores.tag, held_out_prompts()[:prompts]
    asking = {
        "highest": {tag.prompt(tag.highest, text): text for text in plain},
        "nothing": {text: text for text in plain},
        "lowest": {tag.prompt(1, text): text for text in plain},
    }
    texts = tuple(text for by_text in asking.values() for text in by_text)
    images = folder / "images"
    generate.run(
        generate.GenerateConfig(
            models={"base": str(playground_model_path()), "trained": str(run.output)},
            prompts=PromptsConfig(texts=texts),
            seeds=SEEDS,
            sampler=SAMPLER,
            batch_size=36,
            output=images,
        )
    )
    found: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for row in read_manifest(images):
        for name, by_text in asking.items():
            if row.prompt in by_text:
                text = by_text[row.prompt]
                objects = read_objects(Image.open(images / row.file))
                scores = found.setdefault((row.model, name), {})
                scores[text, row.seed] = fidelity(objects, text)
    return found


def table(found: Mapping[tuple[str, str], Scores]) -> str:
    """The figures as Markdown."""
    lines = [
        "| model | fidelity, asked for the lowest | for nothing | for the highest "
        "| highest over lowest: win rate of decided pairs (95 % interval) | wins / ties / losses |",
        "|---|---|---|---|---|---|",
    ]
    for model in ("base", "trained"):
        lowest, highest = found[model, "lowest"], found[model, "highest"]
        c = compare_scores(lowest, highest)
        plain = fmean(found[model, "nothing"].values())
        lines.append(
            f"| {model} | {percent(c.baseline_mean)} | {percent(plain)} | {percent(c.model_mean)} "
            f"| {percent(c.win_rate)} ({percent_interval(c.win_rate_interval)}) "
            f"| {c.wins} / {c.ties} / {c.losses} |"
        )
    return "\n".join(lines) + (
        f"\n\n{c.items} images each of {c.prompts} held-out prompts, {SEEDS} seeds, "
        f"{SAMPLER.steps} steps, guidance {SAMPLER.guidance:g}, by "
        f"`python scripts/score_tags.py`.\n"
    )


def main() -> None:
    """Score, train, ask, fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/score_tags"))
    parser.add_argument("--trial", action="store_true", help="two steps, two prompts; no page")
    given = parser.parse_args()
    page, more, prompts = PAGE, tuple[str, ...](), None
    if given.trial:
        given.folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(PAGE, given.folder / PAGE.name))
        more, prompts = TRIAL, 2
    run = trained(given.folder, *more)
    figures = table(asked(run, given.folder, prompts=prompts))
    fill(page, "score_tags", figures)
    print(figures)


if __name__ == "__main__":
    main()
