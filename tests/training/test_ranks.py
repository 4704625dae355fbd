from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = (
    "import sys\n"
    "from diffalign.training import launch as module\n"
    "popen = module.subprocess.Popen\n"
    "def fake(command, env):\n"
    "    return popen([sys.executable, '-m', 'tests.training.two_ranks', sys.argv[1]], env=env)\n"
    "module.subprocess.Popen = fake\n"
    "sys.exit(module.launch([], processes=2))\n"
)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_agree_on_weights_on_bad_steps_and_on_when_to_stop(tmp_path, python):
    result = subprocess.run(
        [python, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "equal weights from different samples" in result.stdout
    assert result.stdout.count("neither rank took the bad step") == 2
    assert result.stdout.count("both ranks stopped after the same step") == 2
    assert result.stdout.count("pairs were sorted over both ranks") == 2
