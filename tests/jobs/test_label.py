"""`diffalign label`: from a folder to files that training reads, over kills."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import BusyError, ConfigError
from diffalign.jobs import label, train
from diffalign.labelling.answers import AnswerFile
from diffalign.playground.models import playground_model_path
from diffalign.processes import only_writer
from diffalign.training.config import RunConfig
from tests.labelling.builders import Client, generated, grouped, responses
from tests.layouts import make_pairs, write_parquet
from tests.processes import ended, started, wait_until
from tests.runs import figures

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
CHOICES = ("left", "right", "tie", "both_bad", "skip")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers_there(port: int) -> bool:
    try:
        Client(port, "Ana").ask("/")
    except OSError:
        return False
    return True


def test_what_is_given_is_found_out(tmp_path):
    assert label.load(str(generated(tmp_path / "look"))).images == tmp_path / "look"
    assert label.load(str(grouped(tmp_path / "groups"))).images == tmp_path / "groups"
    pairs = write_parquet(tmp_path / "pairs", make_pairs(2))
    assert label.load(str(pairs), ["seed=3"]).data.path == str(pairs)
    rows = str(responses(tmp_path / "rows"))
    assert label.load(rows).responses.path == rows
    found = label.load(rows, ["people=2", f"output={tmp_path}"])
    config.save(found, tmp_path / "label.yaml")
    assert label.load(str(tmp_path / "label.yaml"), ["port=0"]).people == 2


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ([], "label needs a folder"),
        (["images=a", "data={path: b}"], "one of images, data and responses"),
        (["data={path: b}", "together=true"], "together is of images"),
        (["images=a", "scores={x: {file: f, scorer: s}}"], "order is random"),
        (["images=a", "password_file=a", "password_variable=B"], "not in both"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        label.load(None, settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::"])
def test_other_machines_need_a_password(tmp_path, monkeypatch, host):
    monkeypatch.delenv("DIFFALIGN_PASSWORD", raising=False)
    asked = label.load(None, ["images=nowhere", f"host='{host}'", f"output={tmp_path}/out"])
    with pytest.raises(ConfigError, match="there is no password"):
        label.run(asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["", "\n\n", "short"])
def test_a_password_is_neither_empty_nor_short_nor_shown(tmp_path, monkeypatch, given):
    (tmp_path / "word").write_text(given)
    monkeypatch.setenv("LABEL_WORD", given)
    for setting in (f"password_file={tmp_path}/word", "password_variable=LABEL_WORD"):
        asked = label.load(None, ["images=nowhere", setting, f"output={tmp_path}/out"])
        with pytest.raises(ConfigError, match="password") as error:
            label.run(asked)
        assert "short" not in str(error.value)


def test_one_server_writes_in_a_folder(tmp_path):
    asked = label.load(str(generated(tmp_path / "look")), [f"output={tmp_path}/out"])
    with only_writer(tmp_path / "out", of="label"), pytest.raises(BusyError, match="in use"):
        label.run(asked)


@pytest.mark.slow
def test_two_hundred_answers_over_kills_are_all_there_once(tmp_path):
    folder, output, log = (
        generated(tmp_path / "look", prompts=200),
        tmp_path / "out",
        tmp_path / "l",
    )
    port, rng = free_port(), random.Random(11)
    command = ["label", str(folder), f"output={output}", f"port={port}", "seed=4"]
    ana, stack, kills = Client(port, "Ana"), [], sorted(rng.sample(range(10, 190), 2))
    pending = None
    while True:
        with started(*command, log=log) as process:
            wait_until(lambda: answers_there(port), process, log)
            if pending is not None:  # sent as the server was killed: sent again
                assert ana.ask("/answer", pending)[0] == 200
                pending = None
            now = ana.state()
            assert now["done"] == len(stack)
            while now["item"] is not None:
                choice = rng.choice(CHOICES)
                sent = {"item": now["item"]["token"], "answer": choice, "seconds": 1.0}
                if kills and len(stack) == kills[0]:
                    kills.pop(0)
                    connection = http.client.HTTPConnection("127.0.0.1", port)
                    connection.request("POST", "/answer", json.dumps(sent), ana.headers)
                    os.kill(process.pid, signal.SIGKILL)
                    stack.append(choice)
                    pending = sent
                    break
                if stack and rng.random() < 0.1:
                    content = ana.ask("/undo", {"answered": len(stack)})[1]
                    stack.pop()
                else:
                    content = ana.ask("/answer", sent)[1]
                    stack.append(choice)
                now = json.loads(content)
            else:
                os.kill(process.pid, signal.SIGINT)
                assert ended(process, log) == 0, log.read_text()
                break
    own = AnswerFile(output).by_person["Ana"]
    assert [answer.answer for answer in own.values()] == stack
    assert len(own) == len({answer.item for answer in own.values()}) == 200
    lines = (output / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 200 + 2 * sum('"undo"' in line for line in lines) > 200
    decided = sum(choice in ("left", "right", "tie") for choice in stack)
    assert pq.read_metadata(output / "pairs.parquet").num_rows == decided
    assert "base against new" in log.read_text()


@pytest.mark.slow
def test_three_votes_to_one_are_in_the_training(tmp_path, capsys):
    folder, output = generated(tmp_path / "look", prompts=2), tmp_path / "out"
    asked = label.load(str(folder), [f"output={output}"])
    items = label._open(asked)
    output.mkdir()
    from tests.labelling.test_export import given

    answers = AnswerFile(output)
    for number in range(2):
        for line in given(items, number, "left", "left", "left", "right"):
            answers.add(line)
    found = label.run(asked, only_export=True)
    # Of either item 3 and 1 of 4: 1 - 2 (16 - 10) / 3 over (64 - 40) / 7.
    assert found.alpha == pytest.approx(-1 / 6)
    said = " ".join(capsys.readouterr().out.split())
    assert "base against new: 6 won, 0 tied, 2 lost" in said
    assert f"data.path={output}/pairs.parquet" in said
    settings = [
        f"model.path={playground_model_path()}",
        f"data.path={output}/pairs.parquet",
        "data.strength.preference={kind: votes, prior: 0}",
        f"output={tmp_path}/run",
        "data.resolution=32",
        "optimizer.lr=1e-3",
        "training.samples_per_device=2",
    ]
    run = config.load(RunConfig, SMOKE, settings)
    train.run(run)
    assert [row["preference"] for row in figures(tmp_path / "run")] == [0.75, 0.75]
    assert load_file(tmp_path / "run/checkpoint-2/weights.safetensors")


def test_groups_and_responses_are_exported_too(tmp_path):
    for name, data in (("g", grouped(tmp_path / "g")), ("r", responses(tmp_path / "r"))):
        asked = label.load(str(data), [f"output={tmp_path}/{name}-out"])
        items = label._open(asked)
        Path(f"{tmp_path}/{name}-out").mkdir()
        store = AnswerFile(Path(f"{tmp_path}/{name}-out"))
        from diffalign.labelling.answers import Answer

        content = items.content(0)
        store.add(
            Answer(
                person="Ana",
                item=items.items[0].item_id,
                answer="ranking" if name == "g" else "left",
                order=(0, 1),
                ranking=((1,), (0, 2)) if name == "g" else None,
                digests=content.digests(),
            )
        )
        label.run(asked, only_export=True)
    line = json.loads((tmp_path / "g-out/preferences.jsonl").read_text())
    assert line == {"group": "g0", "ranking": [1, [0, 2]]}
    assert pq.read_metadata(tmp_path / "g-out/pairs.parquet").num_rows == 3
    assert pq.read_metadata(tmp_path / "r-out/responses.parquet").num_rows == 1
    assert json.loads((tmp_path / "r-out/agreement.json").read_text())["answers"] == 1
