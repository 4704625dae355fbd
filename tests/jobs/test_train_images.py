"""What a dry run says of image pairs that cannot be used, and of captions that are too long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign import config
from diffalign.errors import DataError, ModelError
from diffalign.jobs import train
from diffalign.models.diffusion.conditioning import cut_prompts
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.playground.models import playground_model_path
from diffalign.training.config import RunConfig
from tests.layouts import make_pairs, write_jsonl

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
MODEL = playground_model_path()


def dry_run(data, *more):
    settings = [f"model.path={MODEL}", f"data.path={data}", f"output={data / 'run'}", *more]
    train.run(config.load(RunConfig, SMOKE, settings), dry_run=True)


def rows_in(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def write(folder, rows):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("gone", ["chosen", "rejected"])
def test_a_dry_run_whose_pairs_are_all_unusable_fails(gone, tmp_path, capsys):
    write_jsonl(tmp_path, make_pairs(6))
    write(tmp_path, [{**row, gone: "gone.png"} for row in rows_in(tmp_path)])
    with pytest.raises(DataError, match=rf"none of the first 4 pairs can be used.*{gone}: missing"):
        dry_run(tmp_path)
    out = capsys.readouterr().out
    assert "pairs.jsonl:1" in out and "All checks passed" not in out


def test_a_dry_run_with_one_usable_pair_passes_and_counts_captions_that_are_cut(tmp_path, capsys):
    write_jsonl(tmp_path, make_pairs(6))
    rows = [{**row, "prompt": f"cat {i}"} for i, row in enumerate(rows_in(tmp_path))]
    rows[0]["rejected"] = "gone.png"
    rows[3]["prompt"] = "a very long caption " * 20
    write(tmp_path, rows)
    dry_run(tmp_path)
    out = capsys.readouterr().out
    assert "All checks passed" in out
    assert "1 of the 4 pairs shown cannot be used: a run stops" in out
    assert "1 of 6 captions: the end is cut, as the text encoder reads 16 tokens" in out


def test_captions_that_fit_are_said_to_fit(tmp_path, capsys):
    write_jsonl(tmp_path, make_pairs(6))
    write(tmp_path, [{**row, "prompt": f"cat {i}"} for i, row in enumerate(rows_in(tmp_path))])
    dry_run(tmp_path)
    assert "none of 6 captions is cut: the longest has" in capsys.readouterr().out


class Words:
    """A tokenizer of words with a mark at each end."""

    def __init__(self, limit):
        self.model_max_length = limit

    def __call__(self, prompts, **_):
        return type("Found", (), {"input_ids": [[0, *prompt.split(), 0] for prompt in prompts]})


def test_the_shortest_tokenizer_decides():
    prompts = ["a b", "a b c", "a b c d", "a b"]
    found = cut_prompts([Words(9), Words(4)], prompts)
    assert (found.seen, found.cut, found.longest) == (3, ("a b c d", "a b c"), 6)
    assert not cut_prompts([Words(6)], prompts).cut


def test_a_model_knows_its_tokenizers_before_its_weights(tmp_path):
    tokenizers = SDXL(path=str(MODEL)).tokenizers()
    assert [tokenizer.model_max_length for tokenizer in tokenizers] == [16, 16]
    with pytest.raises(ModelError):
        SDXL(path=str(tmp_path)).tokenizers()
