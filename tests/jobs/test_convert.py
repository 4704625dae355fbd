from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.errors import ConfigError, ModelError
from diffalign.jobs import convert
from tests.scorers.test_aesthetic import scorer
from tests.test_cli import run
from tests.tiny_rewards import two_images, write_aesthetic

STATE = {"a.weight": torch.arange(6.0).view(2, 3).T, "a.bias": torch.ones(2, dtype=torch.float16)}


def converted(path, **settings):
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return convert.run(config.load(convert.ConvertConfig, None, [f"weights={path}", *overrides]))


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "optimizer": {"lr": 0.1}},
        {"model": {f"module.{name}": value for name, value in STATE.items()}},
        {**STATE, "twice": STATE["a.weight"], "version": 2},
    ],
)
def test_names_values_and_types_stay(tmp_path, content, capsys):
    torch.save(content, tmp_path / "x.pt")
    file = converted(tmp_path / "x.pt")
    assert file == tmp_path / "x.safetensors"
    found = load_file(file)
    assert found.keys() - {"twice"} == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    assert found["a.bias"].dtype == torch.float16
    said = capsys.readouterr().out
    assert "epoch" not in content or "left out, being no weights: epoch, optimizer" in said
    assert not (tmp_path / "x.safetensors.part").exists()


def test_a_scorer_reads_what_was_converted(tmp_path, monkeypatch, capsys):
    write_aesthetic(tmp_path)
    expected = scorer(tmp_path).score(two_images()[0][None], ["a"])
    head = tmp_path / "head.safetensors"
    torch.save(load_file(head), tmp_path / "released.pth")
    head.unlink()
    monkeypatch.chdir(tmp_path)
    command = ["convert", "released.pth", "output=head.safetensors"]
    monkeypatch.setattr("sys.argv", ["diffalign", *command])
    from diffalign import cli

    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and "10 tensors" in capsys.readouterr().out
    assert torch.equal(scorer(tmp_path).score(two_images()[0][None], ["a"]), expected)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("harmed",))


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "x.bin")
    with pytest.raises(
        ModelError, match=r"tensors alone \(weights_only\), and is read in no other"
    ):
        converted(tmp_path / "x.bin")
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "x.safetensors").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"x\.safetensors exists: give another output=FILE"):
        converted(tmp_path / "x.pt")
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_other_files_are_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"holds no tensors by name \(it holds: epoch\)"):
        converted(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(ModelError, match="holds a list, and no tensors by name"):
        converted(tmp_path / "y.pt")
    with pytest.raises(ConfigError, match="is a safetensors file already"):
        converted(tmp_path / "z.safetensors")
    with pytest.raises(ModelError, match="there is no file or folder"):
        converted(tmp_path / "absent.pt")
    with pytest.raises(ConfigError, match=r"give a name that ends in \.safetensors"):
        converted(tmp_path / "x.pt", output=tmp_path / "x.bin")


def test_the_command_says_what_it_takes(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "convert")
    assert status == 1 and "convert takes the file of weights first" in said
