"""Work that is shared: whoever does it, in whichever order, whatever is killed: the same bytes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from diffalign.cli import app
from diffalign.engines.base import Sharing
from diffalign.errors import BusyError, CacheError, ConfigError, DiffalignError
from diffalign.generation.generate import ImagesPlan
from diffalign.generation.text_to_image import TextToImage
from diffalign.processes import only_writer
from diffalign.sessions import Shard
from tests.processes import ended, has_files, started, wait_until
from tests.runs import SCRIPTS, Killed


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


jobs = _script("shared_jobs")
JOBS = jobs.JOBS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.prepare(tmp_path_factory.mktemp("shared"), items=5)


@pytest.fixture(scope="module")
def expected(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one process makes, job by job."""
    folder = tmp_path_factory.mktemp("expected")
    for job in JOBS:
        run(job, place, folder / job)
    return {job: jobs.results(folder / job) for job in JOBS}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray of two processors."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffalign[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS.parent), *sys.path]))
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def run(job: str, place: Path, output: Path, *more: str) -> None:
    app(jobs.command(job, place, output, *more), standalone_mode=False)


def store(job: str, output: Path) -> Path:
    """Where the first blocks of a job go."""
    return {
        "score": output / "scores/.jpeg.blocks",
        "evaluate": output / ".responses.jsonl.blocks",
        "precompute": output / "encodings/.blocks",
    }.get(job, output / ".blocks")


@pytest.mark.parametrize("job", JOBS)
def test_two_shards_make_the_bytes_of_one_command(job, place, expected, tmp_path, capsys):
    output = tmp_path / "out"
    run(job, place, output, "--shard", "2/2")
    said = " ".join("".join(capsys.readouterr()).split())
    assert "Shard 2/2 is done;" in said and "blocks of 1/2 are missing. The shard that ends" in said
    assert jobs.results(output) != expected[job]
    run(job, place, output, "--shard", "1/2")
    if job == "precompute":  # the reference's values come after all encodings
        assert "missing" in capsys.readouterr().out
        run(job, place, output, "--shard", "2/2")
    assert jobs.results(output) == expected[job]
    run(job, place, output, "--shard", "1/2")
    assert jobs.results(output) == expected[job]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("job", JOBS)
def test_two_processes_make_the_bytes_of_one(job, place, expected, tmp_path, python, monkeypatch):
    output = tmp_path / "out"
    if job != "score":  # one starts its workers with nothing loaded, as users do
        monkeypatch.setattr(sys, "executable", python)
    run(job, place, output, "--processes", "2")
    assert jobs.results(output) == expected[job]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("job", JOBS)
def test_two_actors_of_ray_make_the_bytes_of_one(job, place, expected, tmp_path, cluster):
    output = tmp_path / "out"
    run(job, place, output, "--processes", "2", "--engine", "ray")
    assert jobs.results(output) == expected[job]


@pytest.mark.multiprocess
@pytest.mark.parametrize("job", JOBS)
def test_a_killed_command_loses_and_doubles_nothing(job, place, expected, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    moment = partial(has_files, store(job, output), 2)
    if job == "precompute":
        moment = partial(exists, output / "encodings/pairs-00000000.safetensors")
    words = jobs.command(job, place, output)
    with started(*words, log=log, moment=moment) as process:
        assert ended(process, log) == -signal.SIGKILL, log.read_text()
    assert store(job, output).is_dir()
    run(job, place, output)
    assert jobs.results(output) == expected[job]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_end_with_a_command_that_is_killed(place, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    words = jobs.command("generate", place, output, "seeds=40", "--processes", "2")
    moment = partial(has_files, output / ".blocks", 8)
    with started(*words, log=log) as process:
        wait_until(moment, process, log)
        process.kill()
        assert ended(process, log) == -signal.SIGKILL, log.read_text()
        time.sleep(1)
        done = len(list((output / ".blocks").glob("*.jsonl")))
        time.sleep(2)
        assert len(list((output / ".blocks").glob("*.jsonl"))) == done < 200


def exists(path: Path) -> bool:
    return path.exists()


def test_other_settings_go_on_from_what_a_killed_command_left(place, tmp_path, monkeypatch):
    stop_after(3, monkeypatch)
    with pytest.raises(Killed):
        run("generate", place, tmp_path)
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    assert len(before) == 3
    run("generate", place, tmp_path, "batch_size=2")
    written = [p for p, time in before.items() if p.stat().st_mtime_ns == time]
    assert len(written) == 3
    assert (tmp_path / "manifest.jsonl").read_text().count("\n") == 5


def stop_after(blocks: int, monkeypatch) -> None:
    write, written = ImagesPlan.write, []

    def until(plan, block, made):
        write(plan, block, made)
        written.append(block)
        if len(written) == blocks:
            raise Killed

    monkeypatch.setattr(ImagesPlan, "write", until)


def test_another_plan_is_refused_to_a_shard_and_differing_images_to_anyone(place, tmp_path):
    run("generate", place, tmp_path, "--shard", "1/2")
    with pytest.raises(BusyError, match=r"blocks of another plan .* without --shard goes on from"):
        run("generate", place, tmp_path, "seeds=2", "--shard", "2/2")
    with pytest.raises(CacheError, match=r"sampler\.steps 2, and this run asks for 3"):
        run("generate", place, tmp_path, "sampler.steps=3")


def test_shards_at_work_keep_others_out(place, tmp_path):
    with only_writer(tmp_path, of="shard-1-of-2"):
        with pytest.raises(BusyError, match=r"--shard 1/2: this shard is already at work in"):
            run("generate", place, tmp_path, "--shard", "1/2")
        with pytest.raises(BusyError, match=r"shard-1-of-2 is in use"):
            run("generate", place, tmp_path)
        with pytest.raises(BusyError, match=r"shard-1-of-2 is in use"):
            run("generate", place, tmp_path, "--shard", "3/3")
        run("generate", place, tmp_path, "--shard", "2/2")
        assert not (tmp_path / "manifest.jsonl").exists()
    with only_writer(tmp_path), pytest.raises(BusyError, match="is in use"):
        run("generate", place, tmp_path, "--shard", "1/2")


def test_failed_images_are_retried_by_the_shard_that_has_them(place, expected, tmp_path):
    real = TextToImage.generate
    bad = (place / "prompts.txt").read_text().splitlines()[0]

    def fragile(self, texts, seeds):
        if bad in texts:
            raise ValueError("not today")
        return real(self, texts, seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextToImage, "generate", fragile)
        run("generate", place, tmp_path, "--shard", "1/2")
        with pytest.raises(DiffalignError, match=r"(?s)1 images failed.*not today"):
            run("generate", place, tmp_path, "--shard", "2/2")
    assert (tmp_path / "manifest.jsonl").read_text().count("\n") == 4
    run("generate", place, tmp_path)
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(expected["generate"]["manifest.jsonl"].splitlines())


@pytest.mark.parametrize("text", ["3/2", "0/2", "x", "1/0", "-1/2", "1/2/3", "1.5/2", "", "1/"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"write it as I/N, .* I from 1 to N"):
        Shard.parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "ray", "shard": "1/2"}, "shares the work by itself; give one of them"),
        ({"engine": "slurm"}, "there is no 'slurm'"),
        ({"address": "127.0.0.1:1"}, "the engine is local; add --engine ray"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        Sharing.of(**given)


def test_a_benchmark_of_saved_responses_has_nothing_to_share(place, tmp_path):
    (tmp_path / "a.json").write_text('{"question_id": 0, "answer": "yes"}\n')
    words = ["pope", f"questions={place / 'pope.json'}", f"responses={tmp_path / 'a.json'}"]
    with pytest.raises(ConfigError, match="here no model is asked"):
        app(["evaluate", *words, "--processes", "2"], standalone_mode=False)


def test_ray_that_is_absent_or_unreachable_is_a_sentence(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    sharing = Sharing.of(engine="ray", address="127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"nobody listens at 127\.0\.0\.1:1 .*correct --address"):
        sharing.engine.check("auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray, .*pip install 'diffalign\[ray\]'"):
        Sharing.of(engine="ray").engine.check("auto")
