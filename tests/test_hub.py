"""A data set or a model that the hub does not give is told in a sentence, with a way on.

One process of its own asks a stand-in hub on loopback: where the hub is, is read when its libraries
are imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from diffalign import hub
from diffalign.errors import DataError
from tests.layouts import make_pairs, pickapic_rows, write_rows
from tests.stand_in_hub import stand_in_hub
from tests.tiny_models import write_sdxl

ASKING = """
import json, sys, threading
from diffalign.data.preview import first_rows
from diffalign.data.reading import open_data
from diffalign.data.source import DataConfig
from diffalign.errors import DiffalignError
from diffalign.models.sdxl import SDXL

import torch


def pairs(owner, **changes):
    config = DataConfig(path=f"{owner}/pairs", resolution=64, **changes)
    return f"{len(first_rows(open_data(config), 4, config))} pairs"


def model(owner):
    settings = SDXL(path=f"{owner}/model")
    settings.check()
    settings.load(device=torch.device("cpu"), compute_dtype=torch.float32, reference="none")
    return "loaded"


def said(ask, *arguments, **options):
    try:
        return ask(*arguments, **options)
    except DiffalignError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"TRACEBACK {type(error).__name__}: {error}"


answers = {}


def streams(owner):
    answers[f"stream {owner}"] = said(pairs, owner, streaming=True)


def models():  # one after the other: diffusers loads in one thread only
    for owner in owners["models"]:
        answers[f"model {owner}"] = said(model, owner)


owners = json.loads(sys.argv[1])
threads = [threading.Thread(target=streams, args=(owner,)) for owner in owners["streams"]]
threads.append(threading.Thread(target=models))
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for owner in owners["tables"]:
    answers[f"table {owner}"] = said(pairs, owner)
print(json.dumps(answers))
"""
OWNERS = {
    "streams": ["fine", "gone", "closed", "gated", "busy", "moody", "faulty", "mute", "scripted"],
    "tables": ["fine", "gone", "cut"],
    "models": ["fine", "gone", "closed", "gated", "moody", "cut", "mute"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What was said of each repository, as `WHAT OWNER`."""
    root = tmp_path_factory.mktemp("hub")
    rows = pickapic_rows(make_pairs(6))
    write_rows(root / "fine/pairs/data/train-00000-of-00001.parquet", rows)
    write_sdxl(root / "fine/model")
    for owner in ("moody", "cut", "mute"):
        shutil.copytree(root / "fine", root / owner)
    (root / "scripted/pairs").mkdir(parents=True)
    (root / "scripted/pairs/pairs.py").write_text("raise SystemExit\n")
    home = tmp_path_factory.mktemp("home")
    with stand_in_hub(root) as server:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(home),
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        }
        result = subprocess.run(
            [sys.executable, "-c", ASKING, json.dumps(OWNERS)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found
