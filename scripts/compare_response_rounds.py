"""Rounds of responses on the playground: gains over the base and over offline DPO, with intervals.

    python scripts/compare_response_rounds.py                  # all, one after the other
    python scripts/compare_response_rounds.py --only grpo_pope # one; the others as they are
    python scripts/compare_response_rounds.py --trial --folder F   # does it run? changes no page

Each row is a config under configs/playground/responses. A run that is there already is taken as it
is: delete its folder to do it again. Each model responds to questions about the same held-out
scenes, so that differences are of the same scenes, which are resampled. What is between the two
markers of docs/results.md is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from compare_methods import PAGE, TRIAL, call, trial_page
from numpy.typing import NDArray
from pages import fill

from diffalign import config
from diffalign.benchmarks.pope import rules as pope
from diffalign.intervals import Bootstrap, Statistic, Tally, ratio
from diffalign.jobs.demo_responses import answerer
from diffalign.models.vlm.config import VLM
from diffalign.playground.multi_object_scenes import kinds_in
from diffalign.playground.questions import SPLITS
from diffalign.playground.response_quality import (
    EXACT_NAMES,
    answer,
    describe,
    held_out_multi_object_scenes,
    name_of,
    pope_questions,
)
from diffalign.playground.scenes import Scene
from diffalign.response_rules.mentions import Caption, check
from diffalign.training.config import RunConfig

CONFIGS = Path("configs/playground/responses")
ROWS = {
    "dpo": "DPO, pairs of the data",
    "online_dpo": "online DPO",
    "mixed_dpo": "mixed DPO, half of either",
    "sppo": "SPPO, win rates by the truth",
    "dno": "DNO, win rates by the truth",
    "online_ipo": "online IPO, win rates by the truth",
    "grpo_pope": "GRPO on yes-or-no questions",
}
AGAINST_OFFLINE = ("online_dpo", "mixed_dpo", "sppo", "dno", "online_ipo")
SCENES = 300
FEWER = ("rollouts.questions_per_round=16",)
"""What makes a round short enough to see whether it runs."""


def described(texts: Sequence[str], scenes: Sequence[Scene]) -> Tally:
    """Counts of descriptions by scene."""
    truths = [frozenset(map(name_of, kinds_in(scene))) for scene in scenes]
    checked = [
        check(Caption(image_id="", text=text), truth, EXACT_NAMES)
        for text, truth in zip(texts, truths, strict=True)
    ]
    return {
        "captions": np.ones(len(checked)),
        "hallucinating": np.array([bool(c.hallucinated) for c in checked], float),
        "mentions": np.array([len(c.mentions) for c in checked], float),
        "repeated": np.array([len(c.mentions) - len(set(c.mentions)) for c in checked], float),
        "objects": np.array([len(c.truth) for c in checked], float),
        "found": np.array([len(c.found) for c in checked], float),
    }


MEASURES: Mapping[str, tuple[str, Statistic]] = {
    "POPE accuracy": ("pope", pope.accuracy),
    "POPE recall": ("pope", pope.recall),
    "CHAIR-s": ("chair", lambda t: 100 * ratio(t["hallucinating"], t["captions"])),
    "recall": ("chair", lambda t: 100 * ratio(t["found"], t["objects"])),
    "repeated": ("chair", lambda t: 100 * ratio(t["repeated"], t["mentions"])),
}
"""Column -> which questions it is of, and what it makes of their counts; percent."""


def tallies(run: Path | None, scenes: Sequence[Scene]) -> dict[str, Tally]:
    """Counts by scene of a trained model, or of the base."""
    settings = CONFIGS / "dpo.yaml" if run is None else run / "config.yaml"
    saved = config.load(RunConfig, settings)
    assert isinstance(saved.model, VLM), "the configs train responses"
    model = answerer(saved.model, run)
    questions = [q for split in SPLITS for q in pope_questions(scenes, split)]
    responses = answer(model, scenes, [(int(q.image), q.text) for q in questions])
    checked = [
        pope.CheckedResponse(question=q, response=response)
        for q, response in zip(questions, responses, strict=True)
    ]
    return {
        "pope": pope.tally(checked, [str(number) for number in range(len(scenes))]),
        "chair": described(describe(model, scenes), scenes),
    }


def cell(ours: Mapping[str, Tally], theirs: Mapping[str, Tally] | None, column: str) -> str:
    """A figure, or how much higher it is than another model's, with its interval."""
    of, statistic = MEASURES[column]
    joined = {f"ours/{name}": counts for name, counts in ours[of].items()}
    joined |= {f"theirs/{name}": counts for name, counts in (theirs or {}).get(of, {}).items()}

    def figure(counts: Tally) -> NDArray[np.float64]:
        found = statistic({name: counts[f"ours/{name}"] for name in ours[of]})
        if theirs is None:
            return found
        return found - statistic({name: counts[f"theirs/{name}"] for name in ours[of]})

    value = figure({name: counts.sum() for name, counts in joined.items()})
    interval = Bootstrap().intervals(joined, {"it": figure})["it"]
    sign = "" if theirs is None else "+"
    shown = f"{float(value):{sign}.1f}"
    if interval is None:
        return shown
    return f"{shown} ({interval.low:{sign}.1f} to {interval.high:{sign}.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/response_rounds"))
    parser.add_argument("--only", nargs="+", default=[], choices=list(ROWS), help="train these")
    parser.add_argument("--trial", action="store_true", help="two steps, four scenes")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    page, more = (trial_page(folder), TRIAL) if arguments.trial else (PAGE, ())
    scenes = held_out_multi_object_scenes(4 if arguments.trial else SCENES)
    for name in arguments.only or ROWS:
        if not (folder / name / "final").exists():
            command = ["-m", "diffalign", "train", str(CONFIGS / f"{name}.yaml")]
            fewer = FEWER if arguments.trial and name != "dpo" else ()
            call([*command, f"output={folder / name}", *more, *fewer], folder / f"{name}.log")
    base = tallies(None, scenes)
    found = {n: tallies(folder / n, scenes) for n in ROWS if (folder / n / "final").exists()}
    lines = [
        f"| model | {' | '.join(MEASURES)} |",
        f"|---|{'---|' * len(MEASURES)}",
        f"| base | {' | '.join(cell(base, None, column) for column in MEASURES)} |",
    ]
    for name, own in found.items():
        lines += [
            f"| {ROWS[name]} | {' | '.join(cell(own, None, column) for column in MEASURES)} |",
            f"| less the base | {' | '.join(cell(own, base, column) for column in MEASURES)} |",
        ]
        if name in AGAINST_OFFLINE and "dpo" in found:
            cells = " | ".join(cell(own, found["dpo"], column) for column in MEASURES)
            lines.append(f"| less DPO of the data's pairs | {cells} |")
    text = "\n".join(lines) + (
        f"\n\nPercent; {len(scenes)} held-out scenes, greedy; 95 % intervals, resampled by scene, "
        f"differences on the same scenes; by `python scripts/compare_response_rounds.py`.\n"
    )
    fill(page, "response rounds", text)
    print(text)


if __name__ == "__main__":
    main()
