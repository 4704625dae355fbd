"""How long the page of a comparison takes to write, and Chromium to open.

    pip install playwright                      # which takes the Chromium of this system
    python scripts/bench_pages.py               # 500 prompts, 4 models, images of 512 pixels
    python scripts/bench_pages.py --prompts 20 --models 3

Images are clouds of noise at all scales: as WebP of 224 pixels they take some 10 kB each, as many
as photographs do. The page is opened from the disk, with the requests of the network counted; the
clock stops where the first image of the list, to which a link at the top leads, is decoded. The
browser is a fresh one each time.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from measuring import machine, on_this_machine
from PIL import Image

from diffalign.comparison.score import SCORES
from diffalign.files import append_json_lines, write_json
from diffalign.generation.manifest import ManifestRow, append_rows, file_digest
from diffalign.jobs import compare

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WORDS = ("a red fox", "two teapots", "an old harbour", "a glass house", "one astronaut")
FIRST = ".entry img"


def write_images(folder: Path, prompts: int, models: int, pixels: int) -> None:
    """Images, manifest and one column of scores."""
    random = np.random.default_rng(0)
    rows, scores = [], []
    styles = [40 * model * _clouds(random, pixels, finest=3) / 100 for model in range(models)]
    for number in range(prompts):
        scene = _clouds(random, pixels)
        for model in range(models):
            changed = np.clip(scene + styles[model], -1, 1)
            name = f"images/model-{model}/prompt-{number:04}-0.jpg"
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8((changed + 1) * 127.5)).save(file, quality=92)
            digest = file_digest(file.read_bytes())
            prompt = f"{WORDS[number % len(WORDS)]} in the snow, a photograph, number {number}"
            rows.append(
                ManifestRow(
                    model=f"model-{model}",
                    prompt=prompt,
                    prompt_id=f"prompt-{number:04}",
                    seed=0,
                    file=name,
                    sha256=digest,
                    fingerprint=f"weights-{model}",
                    sampler={"steps": 30},
                )
            )
            score = 20 + random.normal() + 0.3 * model
            scores.append(
                {"image": digest, "prompt": prompt, "fingerprint": "none", "score": score}
            )
    append_rows(folder, rows)
    (folder / SCORES).mkdir()
    append_json_lines(folder / SCORES / "pickscore.jsonl", scores)


def _clouds(random: np.random.Generator, pixels: int, finest: int = 9) -> np.ndarray:
    """Noise of which every octave is weaker than the coarser one, [pixels, pixels, 3] around 0."""
    whole = np.zeros((pixels, pixels, 3), dtype=np.float32)
    for octave in range(1, finest):
        size = 2**octave
        small = random.normal(size=(size, size, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(small[..., channel])
            large = plane.resize((pixels, pixels), Image.Resampling.BICUBIC)
            whole[..., channel] += np.asarray(large) / 1.4**octave
    return whole


def browser_here() -> str | None:
    """A Chromium of this system."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def open_page(page: Path, executable: str) -> dict[str, float]:
    """Seconds until the page is loaded and until an image is seen, and requests that left it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tab = browser.new_page()
        left: list[str] = []
        tab.on(
            "request",
            lambda r: left.append(r.url) if not r.url.startswith(("file:", "data:")) else None,
        )
        started = time.perf_counter()
        tab.goto(page.resolve().as_uri())
        loaded = time.perf_counter() - started
        tab.click("nav a:last-child")
        tab.locator(FIRST).first.evaluate("image => image.decode()")
        seen = time.perf_counter() - started
        browser.close()
    return {"loaded_s": loaded, "image_seen_s": seen, "requests_that_left": len(left)}


def main(
    prompts: Annotated[int, typer.Option(help="Prompts of the comparison.")] = 500,
    models: Annotated[int, typer.Option(help="Models, the baseline included.")] = 4,
    pixels: Annotated[int, typer.Option(help="Side of an image.")] = 512,
    rounds: Annotated[int, typer.Option(help="How often the page is opened.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Keep folder and figures here.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = (out or Path(scratch)) / "images"
        if not (folder / "manifest.jsonl").is_file():
            write_images(folder, prompts, models, pixels)
        started = time.perf_counter()
        compare.run(compare.CompareConfig(images=folder, resamples=1000))
        figures = {
            "prompts": prompts,
            "models": models,
            "pixels": pixels,
            "written_s": time.perf_counter() - started,
            "page_mb": (folder / "report.html").stat().st_size / 1e6,
        }
        executable = browser_here()
        if executable is None:
            print(f"There is no browser here ({', '.join(BROWSERS)}): the page was not opened")
        else:
            opened = [open_page(folder / "report.html", executable) for _ in range(rounds)]
            for name in opened[0]:
                figures[name] = statistics.median(each[name] for each in opened)
        print("| " + " | ".join(figures) + " |")
        print("|" + "---|" * len(figures))
        print("| " + " | ".join(f"{value:.3g}" for value in figures.values()) + " |")
        print(on_this_machine(machine()))
        if out is not None:
            write_json(out / "figures.json", figures)


if __name__ == "__main__":
    typer.run(main)
