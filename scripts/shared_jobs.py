"""The jobs whose work several processes can share, each on the playground, small; imported by
`bench_blocks.py`, `kill_workers.py` and the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
PLAYGROUND = ROOT / "assets/playground"
JOBS = ("generate", "score", "evaluate", "synthesise", "precompute")


def prepare(folder: Path, *, items: int = 8) -> Path:
    """Write what the jobs read.

    Args:
        folder: created.
        items: how many prompts, images and questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = (PLAYGROUND / "prompts.txt").read_text().splitlines()
    chosen = [f"{prompts[i % len(prompts)]}{' again' * (i // len(prompts))}" for i in range(items)]
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in chosen))
    questions, asked = [], []
    for number in range(items):
        image = Image.new("RGB", (64, 64), (20 * number % 256, 200, 100))
        ImageDraw.Draw(image).ellipse((8, 8, 20 + number % 40, 40), fill=(250, number % 256, 0))
        name = f"{number:04d}.png"
        image.save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a circle, number {number}")
        label = ("yes", "no")[number % 2]
        questions.append(
            {"question_id": number, "image": name, "text": "Is there a circle?", "label": label}
        )
        asked.append({"image": name, "prompt": "What is in the image?", "answer": "A circle."})
    for file, rows in (("pope.json", questions), ("questions.jsonl", asked)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(job: str, place: Path, output: Path, *more: str) -> list[str]:
    """The command line of a job.

    Args:
        job: one of `JOBS`.
        place: that `prepare` filled.
        output: gets all results.
        more: further arguments.
    """
    vlm = ["model.kind=vlm", f"model.path={PLAYGROUND / 'llava'}"]
    arguments = {
        "generate": [
            f"models.a={PLAYGROUND / 'sdxl'}",
            f"prompts={place / 'prompts.txt'}",
            "sampler.steps=2",
            "batch_size=1",
            f"output={output}",
        ],
        "score": [f"images={output}", "scorer.kind=jpeg", "batch_size=1"],
        "evaluate": [
            "pope",
            f"questions={place / 'pope.json'}",
            *vlm,
            f"asking.images={place}",
            f"asking.saves={output / 'responses.jsonl'}",
            "asking.batch_size=1",
            "asking.max_new_tokens=4",
            f"details={output / 'details.jsonl'}",
            "bootstrap.resamples=100",
        ],
        "synthesise": [
            *vlm,
            f"questions.path={place / 'questions.jsonl'}",
            "synthesis.kind=self_sampled",
            "synthesis.max_new_tokens=4",
            "batch_size=1",
            f"output={output}",
        ],
        "precompute": [
            str(ROOT / "configs/playground/diffusion_dpo_cached.yaml"),
            f"model.path={PLAYGROUND / 'sdxl'}",
            f"data.path={PLAYGROUND / 'preferences'}",
            "data.limit=12",
            "data.visits=6",
            "data.workers=0",
            "training.samples_per_device=4",
            f"encodings_cache={output / 'encodings'}",
            f"reference_cache={output / 'references'}",
            f"output={output / 'run'}",
        ],
    }[job]
    if job == "score":
        copy_images(place, output)
    return [job, *arguments, *more]


def copy_images(place: Path, output: Path) -> None:
    """Have the images that are scored in the folder of the scores, as they are."""
    output.mkdir(parents=True, exist_ok=True)
    for path in place.glob("[0-9]*"):
        copy = output / path.name
        if not copy.exists():
            copy.write_bytes(path.read_bytes())


def results(output: Path) -> dict[str, bytes]:
    """Every file of a job but settings, which name their folder, and locks."""
    paths = (path for path in output.rglob("*") if path.is_file())
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in paths
        if not path.name.endswith((".yaml", ".lock"))
    }


def doubled(output: Path) -> list[str]:
    """Lists of results in which a line is twice."""
    found: Sequence[Path] = sorted(output.rglob("*.jsonl"))
    return [
        str(path)
        for path in found
        if len(lines := path.read_bytes().splitlines()) != len(set(lines))
    ]
