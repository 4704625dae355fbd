"""Kill jobs at random moments, damage what they left, start them again: do they end alike?

    python scripts/faults.py --kills 200
    python scripts/faults.py --kills 20 --kinds generate score

A trial is one job, killed (SIGKILL) one to three times and started again by the command that its
docs name, until it is done. It has to end with the very bytes of one that nothing happened to; the
files that it had finished may not have been written anew.

- `images`, `stream`, `online`, `responses`: training. After a kill its checkpoints and logs may be
  damaged as well: a flipped bit, a cut, missing, emptied or foreign file, a state.json that is none
  any more, odd names. Weights, optimiser state and exported model are compared. Where all
  checkpoints are damaged the resume has to refuse, and to change nothing; a copy is put back.
- `precompute`, `generate`, `score`, `evaluate`, `synthesise`: the same command again.
- `ranks`, `shards`: two processes train, a LoRA or all weights in shards, and one is killed; the
  other has to end within a minute by itself (where they had not met yet after
  `heartbeat.ARRIVAL_S`, which is short here).
- `export`: the shards again, killed after their last checkpoint, as they are gathered and written.
- `launcher`: that of `--processes 2` is killed; its ranks have to end with it.
After a kill file times may be moved into the past or future. First come `--fills` jobs on a disk
with too little room (a tmpfs, for root alone): they have to end with a sentence, and go on where
there is room. All on the playground. One process imports everything once and forks the jobs, so
that a trial costs seconds. Further jobs are entries of `JOBS`, further ways to end of `KINDS`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffalign import cli, config, heartbeat
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
IMAGES = "configs/smoke/diffusion_dpo_sdxl.yaml"
RUNS = {
    "images": (
        IMAGES,
        ("data.path={root}/assets/playground/preferences", "training.samples_per_device=1"),
        "sdxl",
    ),
    "stream": (
        IMAGES,
        (
            "data.path={root}/assets/playground/preferences",
            "data.streaming=true",
            "data.shuffle_block=8",
            "training.samples_per_device=1",
        ),
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


@dataclass(frozen=True)
class Job:
    """A command that is started again as it is, in a folder where it writes."""

    words: tuple[str, ...]
    """Of the command line, from the folder; {given} is what `prepare` made."""
    finished: str
    """Pattern of the files that are whole once they are there."""
    at_once: int
    """How many of them are in work together: so many may be written anew after a kill."""
    prepare: Callable[[Path], None] = lambda given: None
    """Makes what it reads, once, in a folder that no job changes."""
    copied: bool = False
    """Whether it writes where it reads, and so into a copy."""


def prepare_images(given: Path) -> None:
    """Some images to be scored."""
    for number in range(60):
        noise = torch.rand((32, 32, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray((noise * 255).byte().numpy()).save(given / f"{number}.png")
        (given / f"{number}.txt").write_text(f"noise {number}")


def prepare_captions(given: Path) -> None:
    """Captions of a benchmark, and its objects."""
    (given / "synonyms.txt").write_text("dog, puppy\ncat, kitten\nbus\n")
    rows = [{"image_id": i, "caption": f"A puppy and {i} cats."} for i in range(2000)]
    (given / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (given / "objects.json").write_text(json.dumps({str(i): ["dog"] for i in range(2000)}))


PLAYGROUND = f"{ROOT}/assets/playground"
JOBS = {
    "precompute": Job(
        words=(
            *("precompute", f"{ROOT}/configs/playground/diffusion_dpo_cached.yaml"),
            *("output=run", "encodings_cache=encodings", f"model.path={PLAYGROUND}/sdxl"),
            *(f"data.path={PLAYGROUND}/preferences", "data.limit=200", "data.workers=0"),
        ),
        finished="encodings/*.safetensors",
        at_once=0,
    ),
    "generate": Job(
        words=(
            *("generate", f"models.base={PLAYGROUND}/sdxl", "output=images", "seeds=3"),
            *("prompts.texts=[a red circle, a blue cross, two squares]", "sampler.steps=4"),
            "batch_size=2",
        ),
        finished="images/**/*.png",
        at_once=2,
    ),
    "score": Job(
        words=("score", "images=.", "scorer.kind=jpeg", "batch_size=4"),
        finished="*.png",
        at_once=0,
        prepare=prepare_images,
        copied=True,
    ),
    "evaluate": Job(
        words=(
            *("evaluate", "chair", "captions={given}/captions.jsonl", "details=details.jsonl"),
            *("objects={given}/objects.json", "synonyms={given}/synonyms.txt", "--json"),
        ),
        finished="details.jsonl",
        at_once=1,
        prepare=prepare_captions,
    ),
    "synthesise": Job(
        words=(
            *("synthesise", "model.kind=vlm", f"model.path={PLAYGROUND}/llava", "output=made"),
            *(f"questions.path={PLAYGROUND}/responses", "questions.limit=12", "batch_size=2"),
            *("synthesis.kind=self_sampled", "synthesis.max_new_tokens=12"),
        ),
        finished="made/images/*.png",
        at_once=0,
    ),
}
"""Jobs that are no training. Those that share their work among processes go here as well."""
LATE_S = 2.0
"""Within which `export` kills after the last checkpoint."""
LONGEST_LIFE_S = 60.0
"""How long a rank may outlive another that was killed."""
KINDS_OF_DAMAGE = [
    *("flip", "cut", "empty", "delete", "foreign", "file"),
    *("state flip", "state cut", "state odd"),
]
REFUSAL = "no checkpoint of this run can be used"


def settings(kind: str, output: Path) -> Path:
    """Write the config of a run next to its folder."""
    base, *further = TRAINED_BY.get(kind, (kind,))
    path, more, model = RUNS[base]
    overrides = [
        *(text.replace("{root}", str(ROOT)) for text in more),
        *COMMON,
        *further,
        f"model.path={ROOT}/assets/playground/{model}",
        f"output={output}",
    ]
    file = output.with_suffix(".yaml")
    config.save(config.load(RunConfig, ROOT / path, overrides), file)
    return file


def start(
    *words: str, log: Path, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> int:
    """Fork a process that does what `diffalign WORDS` does in a folder."""
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
        os.environ.update(env or {})
        if folder is not None:
            os.chdir(folder)
        sys.argv = ["diffalign", *words]
        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, *, seconds: float | None = None, after: Path | None = None) -> int | None:
    """The exit status; None where the process was killed after so many seconds, which begin where
    there is something at `after`."""
    if seconds is None:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if after is not None and not after.exists():
            until = time.monotonic() + seconds
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


def move_times(folder: Path, chance: random.Random) -> None:
    """Give files times of another clock, in one of two cases: nothing may depend on them."""
    if chance.random() < 0.5:
        for path in folder.rglob("*"):
            os.utime(path, (0, chance.choice([0, 4_000_000_000])))


def is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except CheckpointError:
        return False
    return True


def phase(output: Path) -> str:
    """What a run was doing when it ended."""
    steps = len(checkpoint.checkpoints_in(output))
    if any(output.glob(f".{checkpoint.PREFIX}*")):
        return "in a save"
    if not steps:
        return "in its first step" if (output / "metrics.jsonl").exists() else "while loading"
    if not (output / f"{checkpoint.PREFIX}{STEPS}").exists():
        return "in a step"
    return "with its export there" if (output / "final").exists() else "in its export"


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
    found = [theirs / folder, theirs / "final"]
    paths = (path for place in found for path in place.rglob("*.safetensors"))
    names = [str(path.relative_to(theirs)) for path in paths]
    assert len(names) > 2
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
    """One job, killed and started again until it is done."""

    def __init__(self, kind: str, folder: Path, whole: Whole, chance: random.Random) -> None:
        self.kind, self.folder, self.whole, self.chance = kind, folder, whole, chance
        self.log = folder.with_suffix(".log")
        self.happened: Counter[str] = Counter()

    def go(self) -> None:
        """Do it to the end, and compare that.

        Raises:
            Failed: it did not go as it has to.
        """
        self.prepare_place()
        for _ in range(self.chance.randint(1, 3)):
            if self.killed(self.chance.uniform(0, self.whole.seconds)):
                self.happened["kills"] += 1
                self.interfere()
            else:
                self.happened["ended before their kill"] += 1
                break
        else:
            self.finish()
        different = self.differences()
        self.require(not different, f"not alike: {', '.join(different)}")

    def killed(self, seconds: float) -> bool:
        """Start it, and kill it after so many seconds; whether it lived so long."""
        status = wait(self.start(), seconds=seconds)
        self.require(status in (0, None), f"it ended with status {status}")
        return status is None

    def finish(self) -> None:
        """Start it for the last time."""
        status = wait(self.start())
        self.require(status == 0, f"its last start ended with status {status}")

    def prepare_place(self) -> None:
        """Make what it needs before its first start."""

    def start(self) -> int:
        raise NotImplementedError

    def interfere(self) -> None:
        """What else happens after a kill."""

    def differences(self) -> list[str]:
        """Files of its end that are not as those of the job that nothing happened to."""
        raise NotImplementedError

    def require(self, truth: bool, otherwise: str) -> None:
        if not truth:
            said = self.log.read_text()[-2000:] if self.log.exists() else "it said nothing"
            raise Failed(f"{otherwise}:\n{said}")


class JobTrial(Trial):
    """A job of `JOBS`."""

    def __init__(self, kind: str, folder: Path, whole: Whole, chance: random.Random) -> None:
        super().__init__(kind, folder, whole, chance)
        self.job = JOBS[kind]
        self.place = folder / "place"

    def prepare_place(self) -> None:
        if self.job.copied:
            shutil.copytree(self.whole.given, self.place)
        else:
            self.place.mkdir()

    def start(self) -> int:
        words = [word.replace("{given}", str(self.whole.given)) for word in self.job.words]
        self.before = self.finished()
        return start(*words, log=self.log, folder=self.place)

    def finished(self) -> dict[Path, int]:
        found = self.place.glob(self.job.finished)
        return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

    def interfere(self) -> None:
        self.require_nothing_twice()
        move_times(self.place, self.chance)

    def require_nothing_twice(self) -> None:
        after = self.finished()
        anew = [path.name for path, time in self.before.items() if after.get(path) != time]
        self.require(len(anew) <= self.job.at_once, f"written twice: {', '.join(anew)}")

    def differences(self) -> list[str]:
        self.require_nothing_twice()
        ours, theirs = contents(self.place), contents(self.whole.output)
        return sorted(
            name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
        )


class TrainingTrial(Trial):
    """One run, killed and damaged and resumed to its end."""

    def __init__(self, kind: str, folder: Path, whole: Whole, chance: random.Random) -> None:
        super().__init__(kind, folder, whole, chance)
        self.output = folder / "run"
        self.copies = folder / "copies"
        self.file = self.output.with_suffix(".yaml")

    def prepare_place(self) -> None:
        settings(self.kind, self.output)

    def words(self) -> list[str]:
        again = ["--resume"] if (self.output / "config.yaml").exists() else []
        return ["train", str(self.file), *again]

    def start(self) -> int:
        return start(*self.words(), log=self.log)

    def differences(self) -> list[str]:
        return differences(self.output, self.whole.output)

    def interfere(self) -> None:
        if not (self.output / "config.yaml").exists():
            return
        before = [path for path in checkpoint.checkpoints_in(self.output) if is_whole(path)]
        self.happened[f"killed with {len(before)} checkpoints"] += 1
        shutil.rmtree(self.copies, ignore_errors=True)
        shutil.copytree(self.output, self.copies)
        self.happened.update(interfere(self.output, self.chance))
        move_times(self.output, self.chance)
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


class RanksTrial(TrainingTrial):
    """Two processes that train: one is killed, and the other ends by itself."""

    late = False
    """Whether kills are after the last checkpoint alone."""

    def ranks(self) -> list[int]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        return [
            start(*self.words(), log=self.log, env={**group, "RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ]

    def killed(self, seconds: float) -> bool:
        ranks = self.ranks()
        doomed = self.chance.randrange(2)
        last = self.output / f"{checkpoint.PREFIX}{STEPS}"
        if self.late:
            seconds = self.chance.uniform(0, LATE_S)
        status = wait(ranks[doomed], seconds=seconds, after=last if self.late else None)
        other = ranks[1 - doomed]
        if status is not None:
            self.require((status, wait(other)) == (0, 0), f"rank {doomed} ended with {status}")
            return False
        died = time.monotonic()
        if wait(other, seconds=LONGEST_LIFE_S) is None:
            raise Failed(f"rank {1 - doomed} lived on for {LONGEST_LIFE_S:.0f} s")
        self.happened[f"rank {doomed} was killed"] += 1
        self.happened[f"and the other ended in {5 * int((time.monotonic() - died) / 5)} s"] += 1
        return True

    def finish(self) -> None:
        statuses = [wait(rank) for rank in self.ranks()]
        self.require(statuses == [0, 0], f"its ranks ended with {statuses}")

    def interfere(self) -> None:
        """Damage is for one process to find; see `images`."""
        self.happened[f"killed {phase(self.output)}"] += 1


class LateTrial(RanksTrial):
    """Two processes of which one is killed as the trained weights are gathered and written."""

    late = True


class LauncherTrial(RanksTrial):
    """`--processes 2`, whose launcher is killed: its ranks end with it."""

    def killed(self, seconds: float) -> bool:
        launcher = start(*self.words(), "--processes", "2", log=self.log)
        # Its ranks import everything anew, so that a moment of the whole is later.
        time.sleep(2 * self.chance.random() * IMPORTS_S)
        ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        if (status := wait(launcher, seconds=seconds)) is not None:
            self.require(status == 0, f"the launcher ended with {status}")
            return False
        until = time.monotonic() + LONGEST_LIFE_S
        while alive := [rank for rank in ranks if is_alive(rank)]:
            self.require(time.monotonic() < until, f"ranks {alive} live on")
            time.sleep(0.05)
        self.happened[f"a launcher with {len(ranks)} ranks was killed"] += 1
        return True


def fill(trial: Trial, folder: Path) -> None:
    """Do a job on a disk that is too small for it, and then on a larger one.

    Raises:
        Failed: it did not go as it has to.
    """
    needed = sum(path.stat().st_size for path in trial.whole.output.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    subprocess.run([*mount, "size=1g"], check=True)
    try:
        trial.prepare_place()
        usage = shutil.disk_usage(folder)
        room = usage.used + int(trial.chance.random() * max(1, needed - usage.used))
        subprocess.run([*mount, f"remount,size={room + (1 << 13)}"], check=True)
        status = wait(trial.start())
        said = trial.log.read_text()
        trial.require(status in (0, 1) and "Traceback" not in said, f"full: status {status}")
        trial.require(bool(status == 0 or re.search("No space|[Mm]ake room", said)), "no sentence")
        trial.happened["refused for want of room" if status else "did without"] += 1
        subprocess.run([*mount, "remount,size=1g"], check=True)
        trial.finish()
        different = trial.differences()
        trial.require(not different, f"not alike: {', '.join(different)}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


IMPORTS_S = 8.0
SHARDS = ("images", "model.lora=null", "training.sharding=fsdp2")
TRAINED_BY = {
    "ranks": ("images",),
    "shards": SHARDS,
    "export": SHARDS,
    "launcher": ("images",),
}
"""Kinds that train as another one does, but for further settings."""
KINDS: dict[str, type[Trial]] = {
    **dict.fromkeys(RUNS, TrainingTrial),
    **dict.fromkeys(JOBS, JobTrial),
    "ranks": RanksTrial,
    "shards": RanksTrial,
    "export": LateTrial,
    "launcher": LauncherTrial,
}


def is_alive(pid: str) -> bool:
    """Whether a process is there, and more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass(frozen=True)
class Whole:
    """The job that nothing happened to, which all others are compared with."""

    output: Path
    """Where it wrote."""
    given: Path
    """What it read."""
    seconds: float
    """How long it took."""


def undisturbed(kind: str, folder: Path) -> Whole:
    """Do a job twice, once to warm up, and require that both end alike."""
    given = folder / f"{kind}-given"
    given.mkdir()
    if kind in JOBS:
        JOBS[kind].prepare(given)
    made: list[tuple[Trial, float]] = []
    for name in ("warm", "whole"):
        place = folder / f"{kind}-{name}"
        place.mkdir()
        trial = KINDS[kind](kind, place, Whole(place, given, 0.0), random.Random(0))
        trial.prepare_place()
        if name == "warm" and isinstance(trial, TrainingTrial) and kind in RUNS:
            train.run(config.load(RunConfig, trial.file))  # here: every fork has what this imports
            AcceleratorState._reset_state(reset_partial_state=True)
        began = time.monotonic()
        if not isinstance(trial, TrainingTrial) or name == "whole" or kind not in RUNS:
            trial.finish()
        made.append((trial, time.monotonic() - began))
    (warm, _), (last, seconds) = made
    output = last.output if isinstance(last, TrainingTrial) else last.place  # type: ignore[attr-defined]
    whole = Whole(output, given, seconds)
    warm.whole = whole
    if different := warm.differences():
        sys.exit(f"{kind}: two that nothing happened to differ: {', '.join(different)}")
    return whole


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    """Do trials until there were so many kills; gives a paragraph on each that failed."""
    wholes = {kind: undisturbed(kind, folder) for kind in options.kinds}
    print({kind: f"{whole.seconds:.1f} s" for kind, whole in wholes.items()}, flush=True)
    failures: list[str] = []
    happened: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    filled = [kind for kind in options.kinds if kind in RUNS or kind in JOBS]
    began = time.monotonic()
    number = options.first
    fills = options.fills if os.geteuid() == 0 else 0
    while (fills > 0) or sum(counts["kills"] for counts in happened.values()) < options.kills:
        kinds = filled if fills > 0 else options.kinds
        kind = kinds[number % len(kinds)]
        place = folder / f"trial-{number:03d}"
        place.mkdir()
        trial = KINDS[kind](kind, place, wholes[kind], random.Random(f"{options.seed} {number}"))
        try:
            if fills > 0:
                fill(trial, place)
            else:
                trial.go()
        except Failed as failed:
            failures.append(f"trial {number}, {kind}: {failed.what}")
            happened[kind]["failed"] += 1
        else:
            happened[kind]["ended alike"] += 1
            shutil.rmtree(place)
        happened[kind].update(trial.happened)
        number += 1
        fills -= 1
        print(f"trial {number} ({kind}) is done, {len(failures)} failed so far", flush=True)
    count, kills = number - options.first, sum(each["kills"] for each in happened.values())
    print(
        f"{count - len(failures)} of {count} jobs ended alike after {kills} kills, in "
        f"{time.monotonic() - began:.0f} s"
    )
    for kind, counts in happened.items():
        for name, times in sorted(counts.items()):
            print(f"  {times:4} {kind}: {name}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="At least so many.")
    parser.add_argument("--fills", type=int, default=20, help="Jobs on a full disk, for root.")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="Number of the first trial.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Keeps what failed. Default: a temporary one.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heartbeat.ARRIVAL_S = LONGEST_LIFE_S / 6
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if failures := run(options, folder.resolve()):
            print("\n".join(failures))
            sys.exit(1)


if __name__ == "__main__":
    main()
