"""Passes over what people decided: what trains, what is left out, and which files are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from diffalign.errors import ConfigError, DataError
from diffalign.files import read_json_lines, write_json_lines
from diffalign.generation.generate import Item
from diffalign.generation.prompts import Prompt
from diffalign.likelihoods.transition import Transition
from diffalign.models.diffusion.config import AbstractDiffusion
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings
from diffalign.rollouts.groups import GroupSampler, GroupsConfig, Origin, list_groups, read_groups
from diffalign.rollouts.human_feedback import HumanFeedback
from tests.rollouts.runs import row_metadata

PROCESS = ReverseProcess(steps=3, guidance=2.0)
CPU = torch.device("cpu")


def load(settings: AbstractDiffusion, reference: str):
    return settings.load(device=CPU, compute_dtype=torch.float32, reference=reference)


@pytest.fixture(scope="module")
def folder(tiny_sd15, tmp_path_factory) -> Path:
    """Three groups of three images: a cat, a dog, an owl."""
    settings = SD15(path=str(tiny_sd15))
    sampler = GroupSampler(
        GroupsConfig(images_per_group=3, process=PROCESS), Origin.of(settings, PROCESS), "float32"
    )
    folder = tmp_path_factory.mktemp("groups")
    items = [Item(Prompt(text), 0) for text in ("a cat", "a dog", "an owl")]
    found = sampler.generate(folder, load(settings, "none"), items, {})
    list_groups(folder, map(dataclasses.asdict, found))
    return folder


@pytest.fixture
def names(folder) -> list[str]:
    return [group.group for group in read_groups(folder)]


@pytest.fixture
def settings(tiny_sd15):
    return SD15(path=str(tiny_sd15), lora=LoraSettings(rank=2))


@pytest.fixture
def preferences(tmp_path):
    def write(*rows) -> Path:
        path = tmp_path / "preferences.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def start(
    folder, preferences, settings, tmp_path, *, reference="initial", trained_steps=None, **changes
):
    usual = {
        "run_seed": 3,
        "model": settings,
        "samples_per_device": 2,
        "accumulation": 3,
        "process": PROCESS,
    }
    rollouts = HumanFeedback(
        trajectories=folder,
        preferences=preferences,
        reference=reference,
        trained_steps=trained_steps,
        previewed_prompts=1,
    )
    return rollouts.open(row_metadata(tmp_path / "rounds", **(usual | changes)))


def test_every_step_of_every_decided_pair_trains_once_a_pass(
    folder, names, preferences, settings, tmp_path
):
    said = preferences(
        {"group": names[0], "ranking": [2, 0, 1]}, {"group": names[2], "good": [1], "bad": [0]}
    )
    source = start(folder, said, settings, tmp_path)
    source.bind(load(settings, "adapter_off"))
    passes = [[], []]
    batches = list(islice(source, 12))  # four pairs of three steps are six batches of two
    for number, batch in enumerate(batches):
        passes[number // 6].extend(batch.sample_ids)
    expected = {
        f"{name}/{pair}/step-{step}"
        for name, pair in (
            (names[0], "2-over-0"),
            (names[0], "2-over-1"),
            (names[0], "0-over-1"),
            (names[2], "1-over-0"),
        )
        for step in range(3)
    }
    for seen in passes:
        assert Counter(seen) == Counter(expected)
    assert passes[0] != passes[1]
    assert {prompt for batch in batches for prompt in batch.prompts} == {"a cat", "an owl"}


def test_only_the_first_steps_train_if_so_wished(folder, names, preferences, settings, tmp_path):
    said = preferences({"group": names[0], "ranking": [2, 0, 1]})
    source = start(
        folder, said, settings, tmp_path, trained_steps=2, samples_per_device=3, accumulation=2
    )
    source.bind(load(settings, "adapter_off"))
    seen = [name for batch in islice(source, 2) for name in batch.sample_ids]
    assert Counter(name.rpartition("/")[2] for name in seen) == {"step-0": 3, "step-1": 3}
    with pytest.raises(
        ConfigError, match=r"trained_steps is 4, and likelihood\.process\.steps is 3"
    ):
        start(folder, said, settings, tmp_path, trained_steps=4)


def test_at_the_weights_that_sampled_them_every_ratio_is_one(
    folder, names, preferences, settings, tmp_path
):
    said = preferences({"group": names[1], "ranking": [2, 0, 1]})
    source = start(folder, said, settings, tmp_path, samples_per_device=3)
    model = load(settings, "adapter_off")
    source.bind(model)
    likelihood = Transition(process=PROCESS)
    for batch in islice(source, 3):
        prepared = likelihood.prepare(model, batch)
        with model.reference():
            reference = likelihood.evaluate(model, prepared)
        policy = likelihood.evaluate(model, prepared)
        for view in ("chosen", "rejected"):
            assert torch.allclose(policy[view], reference[view], atol=1e-5)


def test_ties_undecided_pairs_and_silent_groups_are_counted_once(
    folder, names, preferences, settings, tmp_path
):
    said = preferences(
        {"group": names[0], "ranking": [2, [0, 1]]}, {"group": names[1], "ranking": [[0, 1]]}
    )
    source = start(folder, said, settings, tmp_path)
    source.bind(load(settings, "adapter_off"))
    list(islice(source, 7))  # into the third pass
    assert source.skipped_counts == {
        "tied pairs": 2,
        "undecided pairs": 2,
        "groups without a decided pair": 1,
        "groups without a preference": 1,
    }
    lines = source.describe()
    assert "2 decided pairs of 1 groups; left out: 2 tied pairs, 2 undecided pairs" in lines[0]
    assert (tmp_path / "rounds/round-0000/grid.png").exists()


def test_the_reference_may_be_renewed_with_every_pass(
    folder, names, preferences, settings, tmp_path
):
    said = preferences({"group": names[0], "ranking": [2, 0, 1]})
    source = start(folder, said, settings, tmp_path, reference="latest", samples_per_device=3)
    model = load(settings, "past_policy")
    source.bind(model)
    batches = iter(source)
    list(islice(batches, 3))
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.fill_(0.25)
    next(batches)
    with model.reference():
        assert all((p == 0.25).all() for _, p in model.trained_parameters())


def test_a_killed_pass_goes_on_in_its_middle(folder, names, preferences, settings, tmp_path):
    said = preferences({"group": names[0], "ranking": [2, 0, 1]})

    def source():
        made = start(folder, said, settings, tmp_path, samples_per_device=1, accumulation=1)
        made.bind(load(settings, "adapter_off"))
        return made

    whole = [batch.sample_ids for batch in islice(source(), 20)]
    killed = source()
    list(islice(killed, 13))
    again = source()
    again.load_state_dict(killed.state_dict())
    assert [batch.sample_ids for batch in islice(again, 7)] == whole[13:]


def test_other_preferences_are_another_run(folder, names, preferences, settings, tmp_path):
    def fingerprint(ranking):
        said = preferences({"group": names[0], "ranking": ranking})
        return start(folder, said, settings, tmp_path).fingerprint()

    assert fingerprint([0, 1]) == fingerprint([0, 1]) != fingerprint([1, 0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"decides no pair of the 3 groups in .* \(3 groups without a preference\)"),
        ([{"ranking": [[0, 1, 2]]}], r"decides no pair .*\(3 tied pairs, 1 groups without a deci"),
        ([{"ranking": [7]}], "line 1 names image 7, and group .* has images 0 to 2"),
    ],
)
def test_nothing_to_learn_is_refused(folder, names, preferences, settings, tmp_path, rows, message):
    said = preferences(*({"group": names[0], **row} for row in rows))
    with pytest.raises(DataError, match=message):
        start(folder, said, settings, tmp_path)


def test_unknown_groups_are_refused(folder, names, preferences, settings, tmp_path):
    said = preferences({"group": names[0][:-2], "ranking": [0, 1]})
    message = rf"line 1 names .*none of the 3\. Did you mean {names[0]}\?"
    with pytest.raises(DataError, match=message):
        start(folder, said, settings, tmp_path)


def test_a_folder_without_groups_is_refused(preferences, settings, tmp_path):
    with pytest.raises(DataError, match=r"there is no groups\.jsonl .* a trajectories section"):
        start(tmp_path, preferences(), settings, tmp_path)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [("steps", "3", "4"), ("guidance", "2", "5"), ("eta", "1", "0.5")],
)
def test_other_sampling_settings_are_refused(
    folder, names, preferences, settings, tmp_path, name, theirs, ours
):
    other = dataclasses.replace(PROCESS, **{name: type(getattr(PROCESS, name))(float(ours))})
    said = preferences({"group": names[0], "ranking": [0, 1]})
    message = (
        rf"trajectories/.* was sampled with {name} {theirs}, and likelihood\.process\.{name} is "
        rf"{ours}\..*: set likelihood\.process\.{name} to {theirs}, or sample the groups anew"
    )
    with pytest.raises(DataError, match=message):
        start(folder, said, settings, tmp_path, process=other)


def test_another_model_is_refused(folder, names, preferences, tiny_sdxl, tmp_path):
    said = preferences({"group": names[0], "ranking": [0, 1]})
    other = SDXL(path=str(tiny_sdxl))
    message = r"sampled by another model \(fingerprint \w{16}\) than .*sdxl \(fingerprint \w{16}\)"
    with pytest.raises(DataError, match=message):
        start(folder, said, other, tmp_path)


def test_the_same_base_with_another_adapter_is_another_model(
    folder, names, preferences, settings, tmp_path
):
    model = load(settings, "none")
    model.export(tmp_path / "run/final")
    going_on = dataclasses.replace(
        settings, lora=dataclasses.replace(settings.lora, start=tmp_path / "run")
    )
    said = preferences({"group": names[0], "ranking": [0, 1]})
    with pytest.raises(DataError, match=r"another model .*sd15 with the adapter .*model\.lora\.st"):
        start(folder, said, going_on, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction was 'epsilon', .* it is 'velocity'"),
        ({"steps_offset": 0}, "steps_offset was 1, and of .* it is 0"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing was 'leading', .* it is 'trailing'"),
        ({"beta_end": 0.02}, r"schedule was '\w{16}', and of .* it is '\w{16}'"),
    ],
)
def test_another_scheduler_is_refused(
    folder, names, preferences, tiny_sd15, tmp_path, change, message
):
    model = shutil.copytree(tiny_sd15, tmp_path / "model")
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = preferences({"group": names[0], "ranking": [0, 1]})
    with pytest.raises(
        DataError, match=f"(?s)under another scheduler: {message}.*sample the groups"
    ):
        start(folder, said, SD15(path=str(model)), tmp_path)


def test_a_damaged_file_of_trajectories_is_refused(folder, names, preferences, settings, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    (group, *_) = read_groups(copied)
    (copied / group.trajectories).write_bytes(b"rubbish")
    said = preferences({"group": group.group, "ranking": [0, 1]})
    with pytest.raises(DataError, match="is no file of trajectories of this version"):
        start(copied, said, settings, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": lambda images: images[:-1]}, "says images 2, and .* were generated with 3"),
        (
            {"prompt": lambda prompt: prompt + "!"},
            "says prompt '.*!', and .* were generated with '",
        ),
        ({"seed": lambda seed: seed + 1}, "Put the line back as it was"),
    ],
)
def test_an_edited_list_of_groups_is_refused(
    folder, preferences, settings, tmp_path, change, message
):
    copied = shutil.copytree(folder, tmp_path / "copied")
    rows = read_json_lines(copied / "groups.jsonl")
    for name, edit in change.items():
        rows[0][name] = edit(rows[0][name])
    write_json_lines(copied / "groups.jsonl", rows)
    said = preferences({"group": rows[0]["group"], "ranking": [0, 1]})
    with pytest.raises(DataError, match=message):
        start(copied, said, settings, tmp_path)


def test_it_needs_the_steps_of_a_sampler(folder, names, preferences, settings, tmp_path):
    said = preferences({"group": names[0], "ranking": [0, 1]})
    with pytest.raises(ConfigError, match=r"set likelihood\.kind to transition"):
        start(folder, said, settings, tmp_path, process=None)
