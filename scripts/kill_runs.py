"""Kill training runs at random moments, damage their checkpoints, resume: do they end alike?

    python scripts/kill_runs.py --trials 100

A trial is one run. It is killed (SIGKILL) one to three times; after a kill its checkpoints and
logs may be damaged: a flipped bit, a cut, missing, emptied or foreign file, a state.json that is
none any more, odd names. Then it is resumed, until it is done. It has to end with the very weights,
optimiser state and exported model of the run that nothing happened to. Where all checkpoints are
damaged the resume has to refuse, and to change nothing; a copy is put back, and it goes on.

Trials take turns among image pairs, an online run (D3PO) and responses of a vision-language model,
all on the playground. One process imports everything once and forks the runs, so that a trial
costs seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffalign import cli, config
from diffalign.errors import CheckpointError
from diffalign.files import read_json_lines
from diffalign.jobs import train
from diffalign.processes import end_with_parent
from diffalign.training import checkpoint
from diffalign.training.config import RunConfig

ROOT = Path(__file__).parents[1]
STEPS = 6
COMMON = (
    f"training.optimizer_steps={STEPS}",
    "training.checkpoint_every=1",
    "training.keep_checkpoints=3",
    "training.log_every=1",
    "training.ema_decay=0.9",
    "model.lora={rank: 2, dropout: 0.1}",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=0",
)
RUNS = {
    "images": (
        "configs/smoke/diffusion_dpo_sdxl.yaml",
        ("data.path={root}/assets/playground/preferences", "training.samples_per_device=1"),
        "sdxl",
    ),
    "online": (
        "configs/playground/d3po_jpeg.yaml",
        (
            "rollouts.prompts={root}/assets/playground/prompts.txt",
            "rollouts.prompts_per_round=2",
            "rollouts.prompts_per_batch=1",
            "rollouts.images_per_prompt=2",
            "likelihood.process.steps=3",
            "training.samples_per_device=2",
            "training.accumulation=1",
        ),
        "sdxl",
    ),
    "responses": (
        "configs/playground/responses/mdpo.yaml",
        ("responses.path={root}/assets/playground/responses", "training.samples_per_device=1"),
        "llava",
    ),
}
KINDS_OF_DAMAGE = [
    *("flip", "cut", "empty", "delete", "foreign", "file"),
    *("state flip", "state cut", "state odd"),
]
REFUSAL = "no checkpoint of this run can be used"


def settings(kind: str, output: Path) -> Path:
    """Write the config of a run next to its folder."""
    path, more, model = RUNS[kind]
    overrides = [
        *(text.replace("{root}", str(ROOT)) for text in more),
        *COMMON,
        f"model.path={ROOT}/assets/playground/{model}",
        f"output={output}",
    ]
    file = output.with_suffix(".yaml")
    config.save(config.load(RunConfig, ROOT / path, overrides), file)
    return file


def start(file: Path, log: Path, *, resume: bool) -> int:
    """Fork a process that does what `diffalign train` does."""
    sys.stdout.flush()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    status = 1
    try:
        end_with_parent(parent)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["diffalign", "train", str(file), *(["--resume"] if resume else [])]
        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, *, seconds: float | None = None) -> int | None:
    """The exit status; None where the process was killed after so many seconds."""
    if seconds is None:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def damage_checkpoint(folder: Path, chance: random.Random) -> str:
    """Do one thing to a checkpoint that must not be taken for whole afterwards."""
    state = folder / checkpoint.STATE
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    kind = chance.choice(KINDS_OF_DAMAGE)
    if kind in ("flip", "state flip"):
        target = file if kind == "flip" else state
        content = bytearray(target.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        target.write_bytes(content)
    elif kind in ("cut", "state cut"):
        target = file if kind == "cut" else state
        content = target.read_bytes()
        target.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "delete":
        chance.choice([file, state]).unlink()
    elif kind == "foreign":
        (folder / chance.choice(["more.safetensors", "notes.txt"])).write_bytes(b"foreign")
    elif kind == "state odd":
        odd = ["{}", "[]", "null", "[" * 5000, "9" * 5000, '{"step": 1}', "{", "\x00"]
        state.write_text(chance.choice(odd))
    else:
        shutil.rmtree(folder)
        folder.write_text("a file")
    return kind


def interfere(output: Path, chance: random.Random) -> list[str]:
    """Damage a run folder between two starts, in one of ten cases all of its checkpoints; gives
    what was done."""
    done: list[str] = []
    existing = checkpoint.checkpoints_in(output)
    count = chance.choice([0, 1, 1, 1, 2, 2, 2, 2, 2, len(existing)])
    for path in existing[max(0, len(existing) - count) :]:
        if is_whole(path):  # and not damaged by an earlier kill
            done.append(damage_checkpoint(path, chance))
    if chance.random() < 0.2:
        (output / "checkpoint-abc").mkdir(exist_ok=True)
        done.append("odd name")
    for name in ("metrics.jsonl", "timing.jsonl", "skipped.jsonl"):
        if chance.random() < 0.3:
            with (output / name).open("ab") as file:
                file.write(chance.choice([b"\x00\xff\n", b'{"step": 3, "lo', b"[]\n", b"rubbish"]))
            done.append("log")
    return done


def is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except CheckpointError:
        return False
    return True


def contents(folder: Path) -> dict[str, bytes]:
    """What must not change when a resume is refused: all but what a holder says of itself."""
    own = (".lock", ".holder.json")
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in own)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def are_alike(ours: Path, theirs: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit; their metadata may name the run."""
    if not ours.exists():
        return False
    first, second = load_file(ours), load_file(theirs)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], value) for name, value in second.items()
    )


def differences(ours: Path, theirs: Path) -> list[str]:
    """Files of the end of a run whose tensors are not bit for bit those of another one."""
    folder = f"{checkpoint.PREFIX}{STEPS}"
    names = [f"{folder}/{path.name}" for path in (theirs / folder).glob("*.safetensors")]
    names += [str(path.relative_to(theirs)) for path in (theirs / "final").rglob("*.safetensors")]
    assert len(names) > 3
    different = [name for name in names if not are_alike(ours / name, theirs / name)]
    # A row that was damaged is lost; those that are there have to be right.
    rows = {row["step"]: row for row in read_json_lines(theirs / "metrics.jsonl")}
    if any(row != rows[row["step"]] for row in read_json_lines(ours / "metrics.jsonl")):
        different.append("metrics.jsonl")
    return different


@dataclass
class Failed(Exception):
    """A trial that did not go as it has to."""

    what: str


class Trial:
    """One run, killed and damaged and resumed to its end."""

    def __init__(self, kind: str, folder: Path, chance: random.Random) -> None:
        self.output, self.log = folder / "run", folder / "log"
        self.copies = folder / "copies"
        self.file = settings(kind, self.output)
        self.chance = chance
        self.happened: Counter[str] = Counter()

    def go(self, *, seconds: float) -> None:
        """Do it.

        Args:
            seconds: within which it is killed.
        """
        for _ in range(self.chance.randint(1, 3)):
            status = wait(self.start(), seconds=self.chance.uniform(0, seconds))
            if status is not None:
                self.require(status == 0, f"it ended with status {status}")
                self.happened["ended before its kill"] += 1
                return
            self.happened["kills"] += 1
            if (self.output / "config.yaml").exists():
                self.damage()
        status = wait(self.start())
        self.require(status == 0, f"its last start ended with status {status}")

    def start(self) -> int:
        return start(self.file, self.log, resume=(self.output / "config.yaml").exists())

    def damage(self) -> None:
        before = checkpoint.checkpoints_in(self.output)
        self.happened[f"killed with {len(before)} checkpoints"] += 1
        shutil.rmtree(self.copies, ignore_errors=True)
        shutil.copytree(self.output, self.copies)
        self.happened.update(interfere(self.output, self.chance))
        there = checkpoint.checkpoints_in(self.output)
        if not before or any(map(is_whole, there)):
            return
        if there:
            self.require_refusal()
        for path in self.output.glob(f"{checkpoint.PREFIX}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.copies / before[-1].name, before[-1])

    def require_refusal(self) -> None:
        unchanged = contents(self.output)
        status = wait(self.start())
        refused = status == 1 and REFUSAL in self.log.read_text()
        self.require(refused, "no checkpoint was whole, and it was not refused")
        self.require(contents(self.output) == unchanged, "a refused resume changed the folder")
        self.happened["refused, and a copy put back"] += 1

    def require(self, truth: bool, otherwise: str) -> None:
        if not truth:
            raise Failed(f"{otherwise}:\n{self.log.read_text()[-2000:]}")


def undisturbed(kind: str, folder: Path) -> float:
    """The run that all others are compared with; gives how many seconds it took."""
    warm = settings(kind, folder / f"{kind}-warm")
    train.run(config.load(RunConfig, warm))  # here, so that every fork has what this imports
    AcceleratorState._reset_state(reset_partial_state=True)
    began = time.monotonic()
    whole = settings(kind, folder / f"{kind}-whole")
    if status := wait(start(whole, folder / f"{kind}.log", resume=False)):
        sys.exit(f"{kind}: status {status}\n{(folder / f'{kind}.log').read_text()}")
    seconds = time.monotonic() - began
    if different := differences(folder / f"{kind}-whole", folder / f"{kind}-warm"):
        sys.exit(f"{kind}: two runs that nothing happened to differ: {', '.join(different)}")
    return seconds


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    """Do the trials; gives a paragraph on each that failed."""
    seconds = {kind: undisturbed(kind, folder) for kind in options.kinds}
    failures: list[str] = []
    happened: Counter[str] = Counter()
    began = time.monotonic()
    for number in range(options.first, options.first + options.trials):
        kind = options.kinds[number % len(options.kinds)]
        place = folder / f"trial-{number:03d}"
        place.mkdir()
        trial = Trial(kind, place, random.Random(f"{options.seed} {number}"))
        try:
            trial.go(seconds=seconds[kind])
            different = differences(trial.output, folder / f"{kind}-whole")
            trial.require(not different, f"not alike: {', '.join(different)}")
        except Failed as failed:
            failures.append(f"trial {number}, {kind}: {failed.what}")
        else:
            shutil.rmtree(place)
        happened.update(trial.happened)
        print(f"trial {number} is done, {len(failures)} failed so far", flush=True)
    print(
        f"{options.trials - len(failures)} of {options.trials} runs ended alike, in "
        f"{time.monotonic() - began:.0f} s"
    )
    for name, count in sorted(happened.items()):
        print(f"  {count:4} {name}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--first", type=int, default=0, help="Number of the first one.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Keeps what failed. Default: a temporary one.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if failures := run(options, folder.resolve()):
            print("\n".join(failures))
            sys.exit(1)


if __name__ == "__main__":
    main()
