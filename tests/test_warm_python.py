"""The Python of `tests/processes.py` behaves as one: what fails in it fails for who started it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multiprocess

SAY = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['OWN'], "
SAY += "sys.executable, 'torch' in sys.modules])); print('read:', input(), file=sys.stderr)"


def test_it_has_the_words_the_folder_the_environment_and_the_streams_of_who_calls(python, tmp_path):
    said = subprocess.run(
        [python, "-c", SAY, "one", "two words"],
        cwd=tmp_path,
        env={"OWN": "mine"},
        input="given\n",
        capture_output=True,
        text=True,
    )
    assert (said.returncode, said.stderr) == (0, "read: given\n")
    assert json.loads(said.stdout) == [["one", "two words"], str(tmp_path), "mine", python, True]


def test_it_runs_modules_and_files_under_their_names(python, tmp_path):
    (tmp_path / "own.py").write_text("import sys\nprint(__name__, sys.argv)\nimport beside\n")
    (tmp_path / "beside.py").write_text("print('found')\n")
    for words in (["-m", "own"], ["-u", str(tmp_path / "own.py")]):
        ours, theirs = (
            subprocess.run([program, *words, "x"], cwd=tmp_path, capture_output=True, text=True)
            for program in (python, sys.executable)
        )
        assert ours.stdout == theirs.stdout == f"__main__ {[f'{tmp_path}/own.py', 'x']}\nfound\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_how_it_ends_is_told(python, code, status):
    assert subprocess.run([python, "-c", code], capture_output=True).returncode == status


def test_signals_reach_what_it_runs(python):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
    code += "print('here', flush=True); signal.pause()"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.terminate()
        assert process.wait() == 7
