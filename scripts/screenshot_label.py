"""Make the images of docs/label.md: the page of `diffalign label` in a browser.

    python scripts/screenshot_label.py [--out docs/images] [--only phone]

Draws scenes of its own. Needs the extras `label` and `dev`, and a Chromium; writes label-light.png,
label-dark.png and label-phone.png.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter
from playwright.sync_api import Page, sync_playwright

from diffalign.files import sha256_of, write_image
from diffalign.generation.manifest import ManifestRow, append_rows
from diffalign.labelling.server import Pages, listen, server_of
from diffalign.labelling.session import Session
from diffalign.labelling.sources import GeneratedImages
from diffalign.pages.guard import Guard

SIZE, SHARPER = 448, 2
COLOURS = {
    "red": (214, 64, 56),
    "blue": (58, 98, 200),
    "green": (58, 150, 92),
    "yellow": (238, 186, 54),
}
PROMPTS = [
    ("a red ball on a blue box, in soft light", "red", "blue"),
    ("a green ball on a yellow box, in soft light", "green", "yellow"),
    ("a yellow ball on a red box, in soft light", "yellow", "red"),
    ("a blue ball on a green box, in soft light", "blue", "green"),
]
SCREENS: list[tuple[str, dict[str, Any]]] = [
    ("light", {"viewport": {"width": 1120, "height": 700}, "color_scheme": "light"}),
    ("dark", {"viewport": {"width": 1120, "height": 700}, "color_scheme": "dark"}),
    (
        "phone",
        {
            "viewport": {"width": 390, "height": 780},
            "color_scheme": "light",
            "has_touch": True,
            "is_mobile": True,
        },
    ),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", choices=[name for name, _ in SCREENS], help="default: all")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    return parser.parse_args()


def scene(ball: str, box: str, seed: int) -> Image.Image:
    """A shaded ball on a box before a wall; the seed moves them and turns the light."""
    rng = random.Random(seed)
    size = SIZE * SHARPER
    wall = tuple(rng.randrange(205, 235) for _ in range(3))
    image = Image.new("RGB", (size, size), wall)
    draw = ImageDraw.Draw(image)
    floor = size * rng.uniform(0.7, 0.8)
    draw.rectangle((0, floor, size, size), fill=tuple(c - 45 for c in wall))
    side = size * rng.uniform(0.3, 0.4)
    left = size * rng.uniform(0.2, 0.45)
    top = floor + size * 0.06 - side
    shadow = Image.new("L", image.size, 0)
    foot = floor + size * 0.06
    ImageDraw.Draw(shadow).ellipse(
        (left - side * 0.2, foot - side * 0.1, left + side * 1.5, foot + side * 0.12), fill=110
    )
    image.paste((60, 60, 70), mask=shadow.filter(ImageFilter.GaussianBlur(size / 40)))
    for step in range(int(side)):
        light = 1.05 - 0.3 * step / side
        fill = tuple(min(255, int(c * light)) for c in COLOURS[box])
        draw.line((left + step, top, left + step, top + side), fill=fill)
    radius = side * rng.uniform(0.32, 0.45)
    x, y = left + side / 2, top - radius
    for step in range(100):
        inner = radius * (1 - step / 100)
        light = 0.55 + 0.6 * step / 100
        fill = tuple(min(255, int(c * light + 40 * (step / 100) ** 3)) for c in COLOURS[ball])
        centre = (x - (radius - inner) * 0.35, y - (radius - inner) * 0.45)
        draw.ellipse(
            (centre[0] - inner, centre[1] - inner, centre[0] + inner, centre[1] + inner), fill=fill
        )
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def make_folder(folder: Path) -> None:
    """A folder as `diffalign generate` writes it; the second model confuses some colours."""
    rows = []
    for number, (prompt, ball, box) in enumerate(PROMPTS * 10):
        for model in ("base", "aligned"):
            mistaken = model == "base" and number % 2 == 0
            image = scene(box if mistaken else ball, box, 7 * number + (model == "base"))
            file = f"images/{model}/{number}-0.png"
            write_image(folder / file, image)
            rows.append(
                ManifestRow(
                    model=model,
                    prompt=prompt,
                    prompt_id=str(number),
                    seed=0,
                    file=file,
                    sha256=sha256_of(folder / file),
                    fingerprint=model,
                    sampler={},
                )
            )
    append_rows(folder, rows)


@contextmanager
def served(folder: Path, output: Path) -> Iterator[str]:
    """The address of a server of the folder, in a thread."""
    items = GeneratedImages(folder)
    session = Session(items, output, order=range(len(items.items)))
    guard = Guard.of("127.0.0.1")
    pages = Pages(session, guard, question="Which image is better?", agreement=lambda: "")
    with listen("127.0.0.1", 0) as listener:
        server = server_of(pages.app())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def answer_some(page: Page, address: str) -> None:
    """Begin as somebody, and give a few answers."""
    page.goto(address)
    page.fill("input[name=name]", "Ana")
    page.click("button.main")
    for number, key in enumerate(("ArrowLeft", "ArrowRight", "t", "ArrowRight"), start=1):
        page.wait_for_selector(".side img")
        page.wait_for_timeout(1500)  # so that there is a pace
        page.keyboard.press(key)
        page.locator(".count", has_text=f"{number} of").wait_for()
    page.wait_for_timeout(400)


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        make_folder(Path(scratch) / "look")
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for name, screen in SCREENS:
            if args.only not in (None, name):
                continue
            with served(Path(scratch) / "look", Path(scratch) / name) as address:
                page = browser.new_context(**screen).new_page()
                answer_some(page, address)
                page.screenshot(path=args.out / f"label-{name}.png")
                print(f"wrote {args.out / f'label-{name}.png'}")
        browser.close()


if __name__ == "__main__":
    main()
