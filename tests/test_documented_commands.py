"""Every `diffalign` command of the README, the docs and the configs' comments is one that loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from diffalign import arguments, cli, components, config, foreign_flags
from diffalign.benchmarks.base import AbstractBenchmark
from diffalign.jobs import check, compare, generate, label, score, synthesise
from diffalign.training.config import RunConfig

ROOT = Path(__file__).parents[1]
JOBS = {
    "train": RunConfig,
    "precompute": RunConfig,
    "generate": generate.GenerateConfig,
    "score": score.ScoreConfig,
    "compare": compare.CompareConfig,
    "synthesise": synthesise.SynthesiseConfig,
}


def commands() -> list[tuple[str, str]]:
    """Where each command is, and the command with its continued lines."""
    found = []
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {
        page: "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL))
        for page in pages
    }
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        comment = re.findall(r"^#   (.*)$", path.read_text(), re.MULTILINE)
        texts[path] = "\n".join(comment)
    for path, text in texts.items():
        joined = re.sub(r"\\\n\s*", " ", text)
        for line in joined.splitlines():
            if re.match(r"\s*diffalign \w", line):
                found.append((str(path.relative_to(ROOT)), line.strip()))
    return found


COMMANDS = [
    *commands(),
    *(
        (f"{job} --help", cli.example([job]))
        for job in typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    ),
]


def test_there_are_commands():
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(("place", "line"), COMMANDS, ids=[f"{p}: {c}"[:90] for p, c in COMMANDS])
def test_a_documented_command_loads(place, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    job, *words = shlex.split(line, comments=True)[1:]
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert job in known, f"{place}: there is no job {job}"
    options = {name for parameter in known[job].params for name in parameter.opts}
    assert foreign_flags.translation(job, words, options) is None
    settings = []
    while words:
        word = words.pop(0)
        if word in ("--processes", "--resume-from", "--shard", "--engine", "--address"):
            words.pop(0)
        elif not word.startswith("--"):
            settings.append(word)
    if job == "evaluate":
        cls = components.find(AbstractBenchmark, settings.pop(0))  # type: ignore[type-abstract]
    elif job == "check":
        if "=" in settings[0] or Path(settings[0]).exists():
            check.load(settings[0], settings[1:])
        return
    elif job == "label":
        if Path(settings[0]).exists():
            label.load(settings[0], settings[1:])
        else:  # of a folder that is made by another command
            label.load(None, [f"images={settings[0]}", *settings[1:]])
        return
    else:
        cls = JOBS.get(job)
    path, overrides = arguments.split(settings)
    if cls is None or (path is not None and not path.is_file()):
        return  # CONFIG.yaml, runs/NAME/config.yaml and the like
    config.load(cls, path, overrides)
