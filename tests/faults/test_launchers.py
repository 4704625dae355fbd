"""Two ranks by torchrun, by accelerate and under SLURM: a fault on the way changes no weight."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.training.config import RunConfig
from tests import layouts
from tests.processes import PATIENCE_S, run_ranks
from tests.runs import figures

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/smoke/diffusion_dpo_sdxl.yaml"
STEPS = 20
SIZES = [
    *(f"training.optimizer_steps={STEPS}", "training.checkpoint_every=2", "training.log_every=1"),
    *("training.samples_per_device=1", "data.resolution=32", "data.workers=0", "optimizer.lr=1e-3"),
    *("model.lora.dropout=0.1", "training.keep_checkpoints=100"),
]
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def settings(tiny_sdxl, tmp_path_factory):
    """Writes the config of a run into a folder; gives its path."""
    data = layouts.write_pickapic(tmp_path_factory.mktemp("data"), layouts.make_pairs(6))

    def write(output: Path) -> Path:
        places = [f"model.path={tiny_sdxl}", f"data.path={data}", f"output={output}"]
        path = output.with_suffix(".yaml")
        config.save(config.load(RunConfig, SMOKE, [*places, *SIZES]), path)
        return path

    return write


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The run of two ranks that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run_ranks("train", str(settings(output)), log=output.with_suffix(".log"))
    return output


@pytest.fixture
def start():
    """Starts commands, which are ended after the test with all that they started."""
    with contextlib.ExitStack() as stack:

        def start(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
            with log.open("a") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=file, env=env, start_new_session=True
                )
            stack.callback(end, process)
            return process

        yield start


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(reached: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def pid_of_rank(rank: int, output: Path) -> int:
    """The process of a rank of the run that writes in `output`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
            if f"RANK={rank}".encode() in words and str(output.with_suffix(".yaml")).encode() in (
                command
            ):
                return int(folder.name)
    raise AssertionError(f"there is no rank {rank}")


def require_alike(output: Path, whole: Path) -> None:
    last = f"checkpoint-{STEPS}"
    for name in sorted(path.name for path in (whole / last).glob("*.safetensors")):
        ours, theirs = load_file(output / last / name), load_file(whole / last / name)
        assert ours.keys() == theirs.keys(), name
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name
    assert figures(output) == figures(whole)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_accelerate_launch_trains_as_processes_do(settings, whole, start, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", str(free_port())]
    command += ["-m", "diffalign", "train", str(settings(output))]
    assert start(command, log, HERE).wait(PATIENCE_S) == 0, log.read_text()
    require_alike(output, whole)


SRUN = """
while [[ "$1" == --* ]]; do shift; done
[ "$1" = bash ] || exec "$@"
tasks=()
for machine in 1 2; do "$@" & tasks+=("$!"); done
trap 'kill -USR1 "${tasks[@]}"' USR1
status=0
for task in "${tasks[@]}"; do wait_for "$task" || status=1; done
exit "$status"
"""
"""Two tasks, on two machines of this address; signals go to each, as with SLURM's own."""
STAND_INS = {
    "srun": SRUN,
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$ASKED"; fi\n',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"\n',
    "diffalign": 'echo "diffalign $*"\n',
}


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a job on two machines of one device, and stand-ins of its commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}")
        (commands / name).chmod((commands / name).stat().st_mode | stat.S_IEXEC)
    return {
        **HERE,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "ASKED": str(tmp_path / "asked"),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }


def test_a_slurm_job_goes_on_after_a_rank_was_killed_and_after_its_time_was_up(
    settings, whole, start, slurm, tmp_path
):
    output, log, asked = tmp_path / "run", tmp_path / "log", tmp_path / "asked"
    command = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), str(settings(output))]
    job = start(command, log, slurm)
    wait_until((output / "checkpoint-4").exists, job, log)
    os.kill(pid_of_rank(1, output), signal.SIGKILL)  # torchrun starts both ranks again
    wait_until((output / "checkpoint-12").exists, job, log)
    assert log.read_text().count("Resumed from") == 1
    os.kill(job.pid, signal.SIGUSR1)  # as --signal=B:USR1@120 does
    assert job.wait(PATIENCE_S) == 0, log.read_text()
    assert "Stopped on request after step" in log.read_text()
    assert asked.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert not (output / f"checkpoint-{STEPS}").exists()

    again = start(command, log, {**slurm, "SLURM_RESTART_COUNT": "1"})
    assert again.wait(PATIENCE_S) == 0, log.read_text()
    assert log.read_text().count("Resumed from") == 2
    assert len(asked.read_text().splitlines()) == 1
    require_alike(output, whole)


def test_the_jobs_of_an_array_generate_a_shard_each(slurm):
    script = ROOT / "scripts/slurm/generate.sbatch"
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    for more, shard in (({}, "3/8"), ({"SHARDS": "64"}, "3/64")):
        said = subprocess.check_output(
            ["bash", str(script), "models.a=x", "seeds=4"], env={**slurm, **array, **more}
        )
        assert said.decode() == f"diffalign generate models.a=x seeds=4 --shard {shard}\n"


def test_the_scripts_of_slurm_are_bash():
    scripts = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
