"""Run the commands of "One evening" in docs/quickstart.md, with an annotator who follows a rule.

    python scripts/one_evening.py            # some minutes on two cores
    python scripts/one_evening.py --kill --folder runs/killed --same-as runs/evening
    python scripts/one_evening.py --few      # does it run? a few prompts, a few steps

The commands are read from the page. Where `diffalign label` serves its page, the annotator gives a
name, gets both images of each item as a browser does, and answers over HTTP: the one in which the
playground's oracle finds more of the prompt, or a tie; then the server is asked to stop, as by
Ctrl-C. With `--kill` every command gets a SIGKILL at a random moment (labelling at a random answer)
before it is given again; `--same-as` compares the weights that came out. Prints seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.playground.oracle import fidelity, read_objects

PAGE = Path("docs/quickstart.md")
FOLDER = "runs/evening"
FEW_STEPS = (
    *("training.optimizer_steps=4", "training.samples_per_device=2"),
    *("optimizer.warmup_steps=0", "training.checkpoint_every=2"),
)
LATEST_KILL = {"generate": 15, "label": 900, "precompute": 8, "train": 30}
"""Before which second, or answer, a command is killed; others before the second one."""
EXPORTED = "aligned.safetensors"
SERVED = re.compile(r"http://\S+?:\d+")


def commands(page: Path = PAGE) -> list[list[str]]:
    """The words of each command of the section, without `diffalign`."""
    section = page.read_text().partition("## One evening")[2].partition("\n## ")[0]
    block = section.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words[1:] for words in lines if words]


def placed(words: Sequence[str], folder: Path, prompts: Path | None) -> list[str]:
    """A command in another folder, and with fewer prompts and steps."""
    changed = [word.replace(FOLDER, str(folder)) for word in words]
    if prompts is not None:
        changed = [re.sub(r"configs/playground/(\w+\.txt)", rf"{prompts}/\1", w) for w in changed]
        changed += FEW_STEPS if words[0] in ("precompute", "train") else ()
    return changed


def again(words: Sequence[str]) -> list[str]:
    """The command that goes on with another one that was stopped."""
    if words[0] != "train":
        return list(words)
    output = next(word.partition("=")[2] for word in words if word.startswith("output="))
    config = Path(output) / "config.yaml"
    return ["train", str(config), "--resume"] if config.exists() else list(words)


@dataclass
class Annotator:
    """Somebody who answers what the page of `diffalign label` asks."""

    address: str
    name: str = "oracle"

    def __post_init__(self) -> None:
        jar = urllib.request.HTTPCookieProcessor(CookieJar())
        self._open = urllib.request.build_opener(jar).open
        self._ask("/start", urllib.parse.urlencode({"name": self.name}).encode())

    def _ask(self, path: str, content: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.address + path, content, {"Origin": self.address})
        with self._open(request, timeout=60) as response:
            return response.read()

    def label(self, *, at_most: int | None = None) -> int:
        """Answer until nothing is left, or so many times; how often."""
        state = json.loads(self._ask("/state"))
        given = 0
        while state["item"] is not None and given != at_most:
            item = state["item"]
            left, right = (self._worth(token, item["prompt"]) for token in item["images"])
            answer = "tie" if left == right else "left" if left > right else "right"
            content = {"item": item["token"], "answer": answer, "seconds": 1.0}
            state = json.loads(self._ask("/answer", json.dumps(content).encode()))
            given += 1
        return given

    def _worth(self, token: str, prompt: str) -> float:
        image = Image.open(io.BytesIO(self._ask(f"/image/{token}")))
        return fidelity(read_objects(image), prompt)


@contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process of its own, which ends with the block."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffalign", *words],
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def address_in(log: Path, start: int, process: subprocess.Popen[bytes]) -> str:
    """Where the page is served, once the command says so."""
    while process.poll() is None:
        found = SERVED.search(log.read_bytes()[start:].decode(errors="replace"))
        if found:
            return found.group()
        time.sleep(0.05)
    raise SystemExit(f"label ended with status {process.returncode}: see {log}")


def label(words: Sequence[str], log: Path, *, killed_after: float | None = None) -> bool:
    """Serve the page and answer; kill the server after so many answers, or stop it at the end.

    Returns:
        Whether it was killed.
    """
    before = log.stat().st_size if log.exists() else 0
    with started([*words, "port=0"], log) as process:
        annotator = Annotator(address_in(log, before, process))
        given = annotator.label(at_most=None if killed_after is None else int(killed_after))
        if killed_after is not None:
            return True
        process.send_signal(signal.SIGINT)
        if process.wait():
            raise SystemExit(f"label ended with status {process.returncode}: see {log}")
    print(f"  {given} answers", flush=True)
    return False


def run(words: Sequence[str], log: Path, *, killed_after: float | None = None) -> bool:
    """Run a command to its end, or kill it after so many seconds; whether it was killed."""
    with started(words, log) as process:
        try:
            status = process.wait(killed_after)
        except subprocess.TimeoutExpired:
            return True
        if status:
            raise SystemExit(f"{words[0]} ended with status {status}: see {log}")
    return False


def require_equal(ours: Path, theirs: Path) -> None:
    """Raise SystemExit unless two files hold the same tensors, bit for bit."""
    first, second = load_file(ours), load_file(theirs)
    if first.keys() != second.keys() or not all(
        torch.equal(value, second[name]) for name, value in first.items()
    ):
        raise SystemExit(f"{ours} and {theirs} have other weights")
    print(f"the weights are those of {theirs}, bit for bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(FOLDER))
    parser.add_argument("--kill", action="store_true", help="each command once, then again")
    parser.add_argument("--few", action="store_true", help="six prompts, four steps")
    parser.add_argument("--same-as", type=Path, help="folder of another run: are weights equal?")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of --kill")
    options = parser.parse_args()
    folder, chance = options.folder, random.Random(options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = None
    if options.few:
        prompts = folder / "prompts"
        prompts.mkdir(exist_ok=True)
        for path in Path("configs/playground").glob("*prompts.txt"):
            first = path.read_text().splitlines(keepends=True)[:6]
            (prompts / path.name).write_text("".join(first))
    began = time.monotonic()
    for number, said in enumerate(commands()):
        words = placed(said, folder, prompts)
        log = folder / f"{number}-{words[0]}.log"
        do = label if words[0] == "label" else run
        start = time.monotonic()
        if options.kill:
            latest = LATEST_KILL.get(words[0], 2) if not options.few else 2
            if do(words, log, killed_after=chance.uniform(1, latest)):
                do(again(words), log)
            else:
                print(f"  {words[0]} ended before it was killed")
        else:
            do(words, log)
        print(f"{time.monotonic() - start:6.1f} s  {words[0]}", flush=True)
    print(f"{time.monotonic() - began:6.1f} s in all")
    if options.same_as is not None:
        require_equal(folder / EXPORTED, options.same_as / EXPORTED)


if __name__ == "__main__":
    main()
