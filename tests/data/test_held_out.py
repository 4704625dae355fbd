from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from diffalign import world
from diffalign.data.held_out import check_share, group_of_images, is_held_out
from diffalign.data.layout import Layout
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.source import PairSource
from diffalign.errors import DataError
from diffalign.timesteps import TimestepSampling
from tests import layouts

PROMPTS = [f"prompt {n}" for n in range(2000)]


def open_source(path, *, run_seed: int = 0, **settings) -> PairSource:
    config = PairConfig(path=str(path), resolution=32, workers=0, **settings)
    return PairSource.open(
        config,
        views=frozenset({"chosen", "rejected"}),
        run_seed=run_seed,
        layout=Layout.start(samples_per_device=2, accumulation=1),
        timesteps=TimestepSampling(),
        schedule_length=1000,
        skipped=None,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 pairs of 8 prompts."""
    pairs = layouts.make_pairs(24)
    pairs = [
        dataclasses.replace(p, caption=f"a red thing, number {i % 8}") for i, p in enumerate(pairs)
    ]
    return layouts.write_pickapic(tmp_path_factory.mktemp("data"), pairs)


def held_out_ids(source: PairSource, **how) -> list[str]:
    how = {"pairs": 99, "visits": 1, **how}
    return [name for batch in source.held_out.share_of_rank(**how) for name in batch.sample_ids]


def test_of_many_prompts_about_that_share_is_held_out_and_a_larger_share_adds_to_it():
    fifth = {prompt for prompt in PROMPTS if is_held_out(prompt, 0.2)}
    assert 0.17 < len(fifth) / len(PROMPTS) < 0.23
    assert fifth < {prompt for prompt in PROMPTS if is_held_out(prompt, 0.3)}
    assert not any(is_held_out(prompt, None) for prompt in PROMPTS)


def test_which_prompts_are_held_out_never_changes():
    # A run that is resumed under another version must not train on what it evaluated.
    assert [n for n in range(25) if is_held_out(f"prompt {n}", 0.2)] == [8, 11, 23, 24]


def test_all_pairs_of_a_prompt_are_on_one_side_in_every_run_and_none_is_trained_on(data):
    first, second = open_source(data, holdout=0.4), open_source(data, holdout=0.4, run_seed=7)
    assert held_out_ids(first) == held_out_ids(second)
    held = {first.held_out.group(name) for name in held_out_ids(first)}
    trained: Counter[str] = Counter()
    for batch, _ in zip(first, range(3 * 24), strict=False):
        trained.update(batch.captions)
    assert held and trained and not held & set(trained)
    assert len(held) + len(trained) == 8
    assert len(held_out_ids(first)) == 3 * len(held)
    assert f"24 pairs ({3 * len(held)} of them held out)" in first.describe()[1]


def test_held_out_pairs_look_the_same_to_every_run_whatever_it_does_with_its_own(data):
    plain = open_source(data, holdout=0.4, flip=False, caption_dropout=0.0)
    wild = open_source(data, holdout=0.4, run_seed=3, caption_dropout=1.0, crop="random")
    for ours, theirs in zip(
        plain.held_out.share_of_rank(pairs=9, visits=2),
        wild.held_out.share_of_rank(pairs=9, visits=2),
        strict=True,
    ):
        assert ours.prompts == theirs.prompts == ours.captions
        assert ours.noise_seeds == theirs.noise_seeds
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.images["chosen"], theirs.images["chosen"])


def test_each_visit_has_noise_of_its_own(data):
    source = open_source(data, holdout=0.4)
    batches = list(source.held_out.share_of_rank(pairs=99, visits=3))
    seeds = [seed for batch in batches for seed in batch.noise_seeds]
    assert len(seeds) == len(set(seeds)) == 3 * len(source.held_out)


def test_looking_at_what_is_held_out_does_not_move_the_place_in_the_rest(data):
    watched, blind = open_source(data, holdout=0.4), open_source(data, holdout=0.4)
    ours, theirs = iter(watched), iter(blind)
    for _ in range(4):
        held_out_ids(watched)
        assert next(ours).sample_ids == next(theirs).sample_ids
    assert watched.state_dict() == blind.state_dict()


def test_ranks_share_the_held_out_pairs(data, monkeypatch):
    source = open_source(data, holdout=0.4)
    whole = held_out_ids(source)
    monkeypatch.setattr(world, "size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
        parts.append(held_out_ids(source))
    assert all(parts) and sorted(parts[0] + parts[1]) == sorted(whole)
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 5])
def test_a_share_that_leaves_one_side_empty_is_refused(share):
    with pytest.raises(ValueError, match=r"above 0 and below 1, or null for none, got"):
        check_share(share)


def test_where_nothing_or_everything_falls_into_the_share_it_is_said(data):
    with pytest.raises(DataError, match=r"data\.holdout is 1e-06, and no prompt of 24 rows.*Raise"):
        open_source(data, holdout=1e-6)
    with pytest.raises(DataError, match=r"nothing to train on in 24 rows: 24 pairs \(24 of them"):
        open_source(data, holdout=1 - 1e-9)


def test_a_stream_holds_nothing_out(data, tmp_path):
    with pytest.raises(ValueError, match=r"holdout needs all prompts in advance"):
        open_source(data, holdout=0.4, streaming=True)
    shards = layouts.write_webdataset(tmp_path, layouts.make_pairs(4))
    with pytest.raises(DataError, match=r"data\.holdout is 0\.4, and .*a stream does not know"):
        open_source(shards, holdout=0.4)


def test_responses_are_grouped_by_their_images_wherever_these_lie(tmp_path):
    first, second = tmp_path / "a/cat.jpg", tmp_path / "b/cat.jpg"
    assert group_of_images([first], "one") == group_of_images([second], "another")
    assert group_of_images([b"cat"], "") != group_of_images([b"dog"], "")
    assert group_of_images([b"cat", b"dog"], "") != group_of_images([b"dog", b"cat"], "")
    assert group_of_images([], "a question") == "a question"
