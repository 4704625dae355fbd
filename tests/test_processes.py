from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffalign import processes
from diffalign.errors import BusyError, DataError
from diffalign.processes import only_writer

PATIENCE = 300
HOLD = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from diffalign.processes import end_with_parent, only_writer\n"
    "with only_writer(Path(sys.argv[1])):\n"
    "    if 'child' in sys.argv and not os.fork():\n"
    "        end_with_parent()\n"
    "        os.write(1, f'{os.getpid()}\\n'.encode())\n"
    "        time.sleep(1000)\n"
    "    os.write(1, b'ready\\n')\n"
    "    time.sleep(1000)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Starts processes that hold a folder, and ends them after the test."""
    started = []

    def hold(folder: Path, *more: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text()


def wait_until(moment) -> None:
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def test_a_second_process_is_refused_and_told_who_writes_there(tmp_path, holder):
    process = holder(tmp_path / "run", "train", "config.yaml", "judge.key=secret")
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(BusyError) as refused, only_writer(tmp_path / "run"):
        pass
    for part in (
        str(tmp_path / "run"),
        f"process {process.pid} on {socket.gethostname()}, since 20",
        "train config.yaml",
        "output=...",
    ):
        assert part in str(refused.value)
    assert "secret" not in str(refused.value)
    with only_writer(tmp_path / "other"):
        pass


def test_sigkill_of_the_holder_frees_the_folder(tmp_path, holder):
    process = holder(tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    assert (tmp_path / ".holder.json").exists(), "what it said of itself is left behind"
    with only_writer(tmp_path):
        assert json.loads((tmp_path / ".holder.json").read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] in ([".lock"], [])


def test_the_children_of_a_killed_holder_end_with_it_and_keep_nothing(tmp_path, holder):
    process = holder(tmp_path, "child")
    child, ready = sorted(process.stdout.readline() for _ in range(2))
    assert ready == "ready\n"
    process.kill()
    process.wait()
    with only_writer(tmp_path):
        pass
    wait_until(lambda: is_gone(int(child)))


def test_one_process_holds_different_things_of_a_folder_at_once(tmp_path):
    refused = pytest.raises(BusyError, match=r"clip is in use: .* give this one another name")
    clip = only_writer(tmp_path, of="clip")
    with clip, only_writer(tmp_path, of="jpeg"), refused, only_writer(tmp_path, of="clip"):
        pass
    with only_writer(tmp_path, of="clip"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_the_work_goes_on(
    tmp_path, monkeypatch, capsys, code
):
    import fcntl

    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path):
        pass
    assert "this file system has no locks" in capsys.readouterr().err
    assert not (tmp_path / ".holder.json").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"below: cannot be written \(Not a directory\), and so"),
        only_writer(tmp_path / "file/below"),
    ):
        pass

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"),
        only_writer(tmp_path),
    ):
        pass


def test_a_new_folder_in_which_nothing_was_written_is_gone_afterwards(tmp_path):
    for name in (None, "column"):
        with only_writer(tmp_path / "new/below", of=name or ""):
            assert (tmp_path / "new/below").is_dir()
        assert not (tmp_path / "new").exists()
    with only_writer(tmp_path / "new/below"):
        (tmp_path / "new/file").write_text("")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    (tmp_path / "there").mkdir()
    with only_writer(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()


def test_an_error_of_the_work_itself_passes_through(tmp_path):
    with pytest.raises(OSError, match="mine"), only_writer(tmp_path):
        raise OSError("mine")


PARENT = (
    "import os, sys, time\n"
    "child = os.fork()\n"
    "if not child:\n"
    "    from diffalign import processes\n"
    "    if sys.argv[1] == 'elsewhere':\n"
    "        processes.sys.platform = 'darwin'\n"
    "    processes.end_with_parent(os.getppid())\n"
    "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
    "time.sleep(1000)\n"
)


@pytest.mark.parametrize("system", ["linux", "elsewhere"])
def test_a_process_ends_when_its_parent_is_killed(system):
    if system == "linux" and sys.platform != "linux":
        pytest.skip("Linux does it by itself")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, system], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    assert not is_gone(child)
    parent.kill()
    wait_until(lambda: is_gone(child))
    parent.communicate()


def test_a_process_whose_parent_is_gone_already_ends_at_once():
    code = "from diffalign.processes import end_with_launcher; end_with_launcher(); print('on')"
    environment = {**os.environ, processes.PARENT: "1073741823"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert ended.returncode < 0 and not ended.stdout
    del environment[processes.PARENT]
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
