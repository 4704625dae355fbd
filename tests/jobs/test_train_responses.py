"""Methods on responses through the train job: every family; exported and opened again."""

from __future__ import annotations

import json
import math
import shlex
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign import config
from diffalign.errors import ConfigError, DataError, TrainingError
from diffalign.jobs import train
from diffalign.models.vlm.config import VLM
from diffalign.training.config import RunConfig
from diffalign.training.trainer import Trainer
from tests.jobs.killing import kill_when, step_reached
from tests.judged_responses import write_judged_responses
from tests.processes import run_ranks
from tests.responses import random_image
from tests.runs import figures
from tests.tiny_vlm import tiny_llava, tiny_llava_next, tiny_qwen2_vl

FAMILIES = {"llava": tiny_llava, "llava_next": tiny_llava_next, "qwen2_vl": tiny_qwen2_vl}
LN2 = math.log(2)

RUN = """
output: unset
model: {kind: vlm, path: unset, lora: {rank: 2}}
responses:
  path: unset
  kind: tests.judged_responses
  workers: 0
  conditions:
    crop: {kind: crop}
    diffuse: {kind: diffuse}
    masked: {kind: pixel_mask}
    retrieved: {kind: replaced}
    zero: {kind: zero}
  weights:
    changed: {kind: changed}
    counted: {kind: changed, gamma: 4, normalised: false}
    error: {kind: scores, by_label: {image_recognition_error: 3.0}}
    kept: {kind: sentences}
    score: {kind: scores, by_score: {"2": 2.0}}
likelihood: {kind: tokens}
objective: {kind: dpo, beta: 0.1}
optimizer: {lr: 1.0e-3}
training: {optimizer_steps: 2, samples_per_device: 3, log_every: 1}
"""
"""Two steps see each of the six rows once."""


def term(views: str = "", objective: str = "{kind: dpo, beta: 0.1}", weight: float = 1) -> str:
    return f"{{objective: {objective}, views: {{{views}}}, weight: {weight}}}"


def terms(*some: str) -> str:
    return f"objective={{kind: weighted_sum, terms: [{', '.join(some)}]}}"


ANCHOR = "{kind: anchor, beta: 0.1}"
METHODS: dict[str, tuple[float | None, tuple[str, ...]]] = {
    "dpo": (LN2, ()),
    "mdpo": (3 * LN2, (terms(term(), term("rejected: chosen@crop"), term("", ANCHOR)),)),
    "re_align": (2 * LN2, (terms(term(), term("rejected: chosen@retrieved")),)),
    "opa_dpo": (
        4.4 * LN2,
        (
            terms(
                term(),
                term("chosen: 'revised:score', rejected: 'rejected:score'"),
                term("rejected: chosen@masked", weight=0.2),
                term("chosen: 'revised:error', rejected: 'revised:error@masked'", weight=0.2),
                term("", ANCHOR),
                term("chosen: revised", ANCHOR),
            ),
        ),
    ),
    "v_dpo": (None, ("objective={kind: v_dpo, beta: 0.1, gamma: 0.75}",)),
    "chip": (
        None,
        (
            "likelihood.divergence=true",
            terms(
                term(
                    "chosen: 'chosen:counted', rejected: 'rejected:counted', "
                    "'chosen@diffuse': 'chosen:counted@diffuse'",
                    "{kind: chip_released, beta: 0.1}",
                )
            ),
        ),
    ),
    "povid": (LN2, (terms(term(weight=0.5), term("rejected: own", weight=0.5)),)),
    "mask_dpo": (LN2, (terms(term("chosen: 'chosen:kept', rejected: 'rejected:kept'")),)),
    "rlhf_v": (LN2, (terms(term("chosen: 'chosen:changed', rejected: 'rejected:changed'")),)),
    "simpo": (None, ("objective={kind: simpo, beta: 2.5, gamma: 1.4}",)),
    "kto": (None, ("objective={kind: kto, beta: 0.1}",)),
    "ipo": (25.0, ("objective={kind: ipo, beta: 0.1}", "likelihood.reduction=mean")),
    "orpo": (None, ("objective={kind: orpo}",)),
    "sft": (None, ("objective={kind: sft}",)),
}
"""Method -> its loss before the first step, where the policy is the reference; and its settings."""


@cache
def base(family: str) -> Path:
    return FAMILIES[family](Path(mkdtemp()))


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_responses(tmp_path_factory.mktemp("answers"))


@pytest.fixture
def load(responses, tmp_path):
    """Makes a run of overrides; its folder is `output`, below the test's."""
    path = tmp_path / "template.yaml"
    path.write_text(RUN)

    def load(*overrides: str, family: str = "llava", output: str = "run") -> RunConfig:
        places = [f"output={tmp_path / output}", f"model.path={base(family)}"]
        return config.load(RunConfig, path, [*places, f"responses.path={responses}", *overrides])

    return load


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_method_on_every_family(load, method, family):
    at_start, settings = METHODS[method]
    run = load(*settings, family=family)
    adapter = load_file(train.run(run) / "adapter_model.safetensors")
    rows = figures(run.output)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and math.isfinite(row["grad_norm"]) for row in rows)
    assert at_start is None or rows[0]["loss"] == pytest.approx(at_start, abs=1e-5)
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert not (run.output / "skipped.jsonl").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_merges_opens_elsewhere_and_writes(load, family, capsys):
    settings = ("model.merge_on_export=true", "optimizer.lr=0.1")
    run = load(*METHODS["mdpo"][1], *settings, family=family)
    final = train.run(run)
    original = load_file(base(family) / "model.safetensors")
    merged = load_file(final / "merged/model.safetensors")
    tower = [name for name in original if "vision" in name or "visual" in name]
    assert tower and all(torch.equal(merged[name], original[name]) for name in tower)
    changed = [name for name in original if not torch.equal(merged[name], original[name])]
    assert changed and all("layers" in name and "proj" in name for name in changed)

    opened = AutoModelForImageTextToText.from_pretrained(base(family))
    adapted = PeftModel.from_pretrained(opened, final).eval()
    whole = AutoModelForImageTextToText.from_pretrained(final / "merged").eval()
    processor = AutoProcessor.from_pretrained(final)
    card = (run.output / "README.md").read_text()
    assert "library_name: peft" in card and 'PeftModel.from_pretrained(model, "final")' in card
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    image = random_image(0, size=(20, 12))
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (adapted, whole)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    written = [model.generate(**inputs, **options)[0].tolist() for model in (adapted, whole)]
    assert written[0] == written[1]
    assert len(written[0]) > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("shape", ["lora", "full"])
def test_the_end_of_a_run_names_a_command_that_opens_its_model(load, capsys, shape):
    run = load("model.lora=null" if shape == "full" else "model.lora.alpha=3")
    final = train.run(run)
    printed = capsys.readouterr().out
    assert "generate" not in printed
    (line,) = (line for line in printed.splitlines() if "diffalign evaluate chair" in line)
    settings = [part for part in shlex.split(line) if part.startswith("model.")]
    named = [part.removeprefix("model.") for part in settings if part != "model.kind=vlm"]
    model = config.load(VLM, None, named)
    model.check()
    opened = model.load(device=torch.device("cpu"), compute_dtype=torch.float32, reference="none")
    values = {name.removeprefix("model."): v for name, v in opened.trained_parameters()}
    if shape == "full":
        written = load_file(final / "model.safetensors")
        assert all(torch.equal(written[name], values[name]) for name in written if name in values)
        assert "library_name: transformers" in (run.output / "README.md").read_text()
    else:
        written = load_file(final / "adapter_model.safetensors")
        assert sum(float(v.abs().sum()) for v in written.values()) == pytest.approx(
            sum(float(v.detach().abs().sum()) for v in values.values()), rel=1e-5
        )


def test_a_dry_run_shows_responses_and_how_many_images_they_are_about(load, capsys):
    run = load()
    assert train.run(run, dry_run=True) is None
    shown = capsys.readouterr().out
    for text in ("chosen", "rejected", "revised", "a red cat sits here", "1: 12 x 20", "16 x 16"):
        assert text in shown
    assert not run.output.exists()


def test_a_dry_run_does_not_pass_where_no_pair_can_be_used(load):
    with pytest.raises(DataError, match=r"none of the first 4 pairs.*row above max_length: .*Fix"):
        train.run(load("responses.max_length=3"), dry_run=True)


def test_a_run_on_responses_that_is_too_large_is_told_what_its_settings_save(load, monkeypatch):
    def fit(trainer):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(TrainingError, match=r"likelihood\.concatenated: false.*positions_at_once"):
        train.run(load())


LONG = (
    *METHODS["mdpo"][1],
    "model.lora.dropout=0.1",
    "responses.workers=1",
    "training.optimizer_steps=12",
    "training.samples_per_device=2",
    "training.checkpoint_every=2",
    "training.ema_decay=0.9",
)


def test_a_run_killed_and_resumed_ends_bit_for_bit_alike(load, tmp_path):
    whole, killed = load(*LONG, output="whole"), load(*LONG, output="killed")
    train.run(whole)
    config.save(killed, tmp_path / "killed.yaml")
    kill_when(tmp_path / "killed.yaml", partial(step_reached, killed.output, 5))
    train.run(killed, resume=killed.output)
    assert figures(killed.output) == figures(whole.output)
    for name in ("weights", "average", "optimizer"):
        ours, theirs = (
            load_file(run.output / f"checkpoint-12/{name}.safetensors") for run in (killed, whole)
        )
        assert theirs and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_and_two_agree_on_responses(load, tmp_path):
    more = (*METHODS["mdpo"][1], "training.samples_per_device=2", "training.optimizer_steps=3")
    one, two = load(*more, "training.accumulation=2", output="one"), load(*more, output="two")
    train.run(one)
    config.save(two, tmp_path / "two.yaml")
    run_ranks("train", str(tmp_path / "two.yaml"), log=tmp_path / "log")
    for ours, theirs in zip(figures(one.output), figures(two.output), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    first, second = (
        load_file(run.output / "checkpoint-3/weights.safetensors") for run in (one, two)
    )
    assert first and all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


UNPAIRED = {
    "kto": "objective={kind: kto, beta: 0.1, undesirable_weight: 1.5}",
    "bco": "objective={kind: bco, beta: 0.1}",
    "npo": "objective={kind: npo, beta: 0.1}",
    "sft": "objective={kind: sft}",
}


@pytest.fixture
def labelled(tmp_path: Path) -> list[str]:
    """Settings of a run on responses of their own, some of them about images."""
    rows = []
    for i in range(8):
        random_image("labelled", i, size=(12, 12)).save(tmp_path / f"{i}.png")
        row = {"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": i % 3 != 0}
        rows.append({**row, "images": [f"{i}.png"]} if i % 2 else row)
    file = tmp_path / "labelled.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plain = "responses={kind: auto, workers: 0}"
    return [plain, f"responses.path={file}", "training.samples_per_device=2"]


@pytest.mark.parametrize("method", UNPAIRED)
def test_single_responses_are_learnt_in_the_direction_of_their_label(load, labelled, method):
    run = load(*labelled, UNPAIRED[method], "training.optimizer_steps=6", "optimizer.lr=0.01")
    train.run(run)
    rows = figures(run.output)
    assert len(rows) == 6 and all(math.isfinite(row["loss"]) for row in rows)
    if method == "sft":
        assert rows[-1]["loss"] < rows[0]["loss"]
        return
    drift = [row["drift/rejected"] for row in rows if "drift/rejected" in row]
    if method == "npo":
        assert drift[-1] < 0
    else:
        liked = [row["drift/chosen"] for row in rows if "drift/chosen" in row]
        assert liked[-1] > drift[-1]
        assert "accuracy" not in rows[-1]


def test_a_dry_run_of_single_responses_shows_their_labels(load, labelled, capsys):
    assert train.run(load(*labelled, UNPAIRED["kto"]), dry_run=True) is None
    shown = capsys.readouterr().out
    assert "read as unpaired" in shown and "5 desirable, 3 undesirable" in shown


@pytest.mark.parametrize(
    "objective",
    [
        "objective={kind: dpo, beta: 0.1}",
        "objective={kind: simpo, beta: 2.5, gamma: 1.4}",
        "objective={kind: weighted_sum, terms: [{objective: {kind: kto, beta: 0.1}}]}",
    ],
)
def test_single_responses_are_refused_where_two_are_compared(load, labelled, objective):
    with pytest.raises(DataError, match="compares two responses to one prompt: use kto"):
        train.run(load(*labelled, objective), dry_run=True)


def test_reference_values_of_single_responses_are_not_kept(load, labelled):
    with pytest.raises(ConfigError, match=r"unpaired rows.*Leave reference at auto"):
        train.run(load(*labelled, UNPAIRED["kto"], "reference=cached"))


def test_a_dry_run_shows_the_conversation_of_a_side_of_its_own(load, tmp_path, capsys):
    asked, response = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "T"}
    row = {"chosen": [asked, response], "rejected": [asked, response, {**asked, "content": "Why?"}]}
    row["rejected"].append({"role": "assistant", "content": "a"})
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    settings = ["responses={kind: auto, workers: 0}", f"responses.path={file}"]
    assert train.run(load(*settings), dry_run=True) is None
    shown = capsys.readouterr().out
    assert "prompt of rejected" in shown and "Why? (its own: 3 turns, 0 images)" in shown


def test_a_dry_run_shows_what_it_can_before_it_says_what_would_end_the_run(load, tmp_path, capsys):
    rows = [{"prompt": "What?", "chosen": "T</s>", "rejected": text} for text in ("a", "T")]
    file = tmp_path / "ends.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = ["responses={kind: auto, workers: 0}", f"responses.path={file}"]
    with pytest.raises(DataError, match=r"1 of 2 pairs(.|\n)*jsonl:2 \(identical chosen and rej"):
        train.run(load(*settings), dry_run=True)
    assert "ends.jsonl:1" in capsys.readouterr().out
    assert train.run(load(*settings, "responses.max_bad_fraction=0.5"), dry_run=True) is None
