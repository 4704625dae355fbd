"""Ranks of a gloo group on this machine: one is killed, stopped, slow, failing, or of another
version."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S

SILENCE_S = 2.0
"""Of these tests."""
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["diffalign.jobs.train", "diffalign.jobs.generate"])


def rank_main(rank: int, size: int, port: int, log: Path, body: Callable[[int], None]) -> None:
    """A rank: it enters the group and its heartbeat, and does the rest there."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(size))
    import torch.distributed as dist

    from diffalign import heartbeat

    if body is never_come:
        heartbeat.ARRIVAL_S = SILENCE_S
        if rank == 1:
            return
    if body is another_version and rank == 1:
        versions = {**heartbeat._versions(), "torch": "1.0"}
        heartbeat._versions = lambda: versions
    with heartbeat.Heartbeat(silence=SILENCE_S, every=0.2) as beat:
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        beat.meet()
        body(rank)
    dist.destroy_process_group()


class Ranks:
    """Processes that do `body` together."""

    def __init__(self, folder: Path, body: Callable[[int], None], size: int) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.log = folder / "log"
        self.processes = [
            context.Process(target=rank_main, args=(rank, size, port, self.log, body))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait_until_ready(self) -> None:
        """Until every rank has printed its line."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.log.exists() or self.log.read_text().count("ready") < len(self.processes):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self, but: int | None = None) -> tuple[list[int | None], str]:
        """Exit statuses and output."""
        for rank, process in enumerate(self.processes):
            if rank != but:
                process.join(PATIENCE_S)
        return [process.exitcode for process in self.processes], self.log.read_text()


@pytest.fixture
def started(tmp_path):
    """Starts ranks, and ends what is left of them after the test."""
    with contextlib.ExitStack() as stack:

        def start(body: Callable[[int], None], size: int = 3) -> Ranks:
            ranks = Ranks(tmp_path, body, size)
            for process in ranks.processes:
                stack.callback(process.kill)
            return ranks

        yield start


def collective(rank: int) -> None:
    os.write(1, b"ready\n")
    time.sleep(3600) if rank == DOOMED else wait()


def wait() -> None:
    from diffalign import world

    world.wait()


DOOMED = 1


def doomed_main(rank: int) -> None:
    os.write(1, b"ready\n")
    time.sleep(3600) if rank == 0 else wait()


def slow(rank: int) -> None:
    """One rank works far longer than the silence that is borne."""
    if rank == 1:
        deadline = time.monotonic() + 3 * SILENCE_S
        while time.monotonic() < deadline:
            sum(range(10_000))
    wait()


def failing(rank: int) -> None:
    if rank == 1:
        raise ValueError("its own trouble")
    wait()


def failing_main(rank: int) -> None:
    if rank == 0:
        raise ValueError("its own trouble")
    wait()


def another_version(rank: int) -> None:
    wait()


def never_come(rank: int) -> None:
    """One rank ends before it has met the others."""


def sentences(text: str) -> list[str]:
    """What the heartbeat said; nothing else may have been said."""
    return [line for line in text.splitlines() if line != "ready"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_is_killed_ends_the_others_with_one_sentence(started):
    ranks = started(collective)
    ranks.wait_until_ready()
    ranks.processes[DOOMED].kill()
    codes, text = ranks.ended()
    assert codes == [1, -signal.SIGKILL, 1]
    assert len(sentences(text)) == 1, text
    (said,) = sentences(text)
    host, pid = re.escape(socket.gethostname()), ranks.processes[DOOMED].pid
    assert re.fullmatch(
        rf"Rank 1 on {host} \(process {pid}\) ended at \d\d:\d\d:\d\d without a word, .* --resume",
        said,
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_is_stopped_ends_the_others_with_one_sentence(started):
    ranks = started(collective)
    ranks.wait_until_ready()
    os.kill(ranks.processes[DOOMED].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    codes, text = ranks.ended(but=DOOMED)
    assert codes == [1, None, 1] and time.monotonic() - stopped >= SILENCE_S
    assert len(sentences(text)) == 1, text
    (said,) = sentences(text)
    assert said.startswith("Rank 1 on ") and "has given no sign of life since" in said
    os.kill(ranks.processes[DOOMED].pid, signal.SIGCONT)  # it finds that the run is over
    codes, text = ranks.ended()
    assert codes == [1, 1, 1] and len(sentences(text)) == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_where_the_main_rank_is_gone_one_of_each_machine_says_so(started, number):
    ranks = started(doomed_main)
    ranks.wait_until_ready()
    os.kill(ranks.processes[0].pid, number)
    codes, text = ranks.ended(but=0)
    assert codes[1:] == [1, 1]
    assert len(sentences(text)) == 1, text
    (said,) = sentences(text)
    assert said.startswith("Rank 0 on ") and said.endswith("Go on with --resume")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_slow_rank_is_waited_for_and_the_end_is_quiet(started):
    codes, text = started(slow).ended()
    assert (codes, sentences(text)) == ([0, 0, 0], [])


@pytest.mark.multiprocess
def test_a_run_that_is_stopped_as_a_whole_and_continued_goes_on(started):
    ranks = started(slow)
    time.sleep(1.0)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks.processes:
            os.kill(process.pid, number)
        time.sleep(2 * SILENCE_S)
    codes, text = ranks.ended()
    assert (codes, sentences(text)) == ([0, 0, 0], [])


@pytest.mark.multiprocess
def test_an_error_of_one_rank_is_told_once_with_the_place(started):
    codes, text = started(failing).ended()
    assert codes == [1, 1, 1]
    assert text.count("Traceback") == 1 and "ValueError: its own trouble" in text
    assert len(re.findall(r"^Rank 1 on .* ended with an error at .*--resume$", text, re.M)) == 1
    assert "gloo" not in text


@pytest.mark.multiprocess
def test_an_error_of_the_main_rank_is_told_by_itself_alone(started):
    codes, text = started(failing_main).ended()
    assert codes == [1, 1, 1]
    assert text.count("Traceback") == 1 and "ValueError: its own trouble" in text
    assert "Rank " not in text and "gloo" not in text


@pytest.mark.multiprocess
def test_a_rank_of_another_version_is_refused_in_one_sentence(started):
    codes, text = started(another_version).ended()
    assert codes == [1, 1, 1]
    assert text.count("ConfigError: rank 1 on") == 1
    assert re.search(r"rank 1 on \S+ runs torch 1\.0, and rank 0 on \S+ torch \d", text)


@pytest.mark.multiprocess
def test_ranks_that_wait_in_vain_for_one_that_never_started_end(started):
    codes, text = started(never_come).ended()
    assert codes == [1, 0, 1]
    assert re.search(
        r"^Rank 0 on \S+ waited 2 s for all 3 ranks of the run to start and", text, re.M
    )
    assert "meet at 127.0.0.1:" in text and "Traceback" not in text, text
