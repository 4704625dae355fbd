from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from diffalign.errors import ConfigError
from diffalign.training.launch import RESTARTS, check_restarts, restarted
from tests.processes import PATIENCE_S

PROGRAM = (
    "import sys\n"
    "from diffalign.training import launch as module\n"
    "popen = module.subprocess.Popen\n"
    "def fake(command, env):\n"
    "    return popen([sys.executable, '-c', sys.argv[1]], env=env)\n"
    "module.subprocess.Popen = fake\n"
    "sys.exit(module.launch([], processes=2))\n"
)


def launched(child: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, child], stdout=subprocess.PIPE)


def test_each_process_knows_its_rank_and_the_world():
    process = launched(
        "import os\n"
        "names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR'\n"
        "os.write(1, (' '.join(os.environ[name] for name in names) + '\\n').encode())"
    )
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert sorted(text.decode().split("\n")) == ["", "0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]
    assert process.returncode == 0


@pytest.mark.slow
def test_a_failing_process_ends_the_others_and_its_status_is_kept():
    process = launched(
        "import os, sys, time\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(9999)"
    )
    assert process.wait(timeout=PATIENCE_S) == 7


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_a_clean_end_is_waited_for(number):
    process = launched(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.write(1, b'ready\\n')\n"
        "time.sleep(9999)\n"
        "sys.exit(1)"
    )
    assert process.stdout.readline() == process.stdout.readline() == b"ready\n"
    os.kill(process.pid, number)
    assert process.wait(timeout=PATIENCE_S) == 0


def test_killing_the_launcher_ends_its_processes():
    launcher = launched(
        "import os, time\n"
        "from diffalign.processes import end_with_launcher\n"
        "end_with_launcher()\n"
        "os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "time.sleep(9999)"
    )
    children = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    # The pipe ends when nobody is left to write to it.
    assert launcher.stdout.read() == b""
    for child in children:
        with pytest.raises(ProcessLookupError):
            while True:  # its entry goes when the system has collected it
                os.kill(child, 0)
                time.sleep(0.02)


@pytest.mark.slow
def test_a_process_that_the_system_killed_is_said_to_be_a_matter_of_memory():
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGKILL)"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, code], stderr=subprocess.PIPE)
    _, text = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 137
    assert b"killed by SIGKILL" in text and b"Lower data.workers" in text


def test_what_a_launcher_counts_tells_that_it_started_the_command_again(monkeypatch):
    for name in RESTARTS:
        monkeypatch.delenv(name, raising=False)
    assert not restarted()
    for name in RESTARTS:
        monkeypatch.setenv(name, "0")
        assert not restarted()
        monkeypatch.setenv(name, "2")
        assert restarted()
        monkeypatch.delenv(name)


def test_torchrun_that_could_not_start_the_ranks_again_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match=r"--max-restarts 3 .*DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_restarts()
    monkeypatch.setenv("RANK", "1")  # rank 0 tells it for all
    with pytest.raises(SystemExit):
        check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_restarts()
