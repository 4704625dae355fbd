"""Rounds of responses: what is sampled, what it earns, and the batches that are made of it."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.questions import QuestionConfig
from diffalign.errors import DataError
from diffalign.files import read_json_lines
from diffalign.likelihoods.tokens import Tokens
from diffalign.models.vlm.config import VLM
from diffalign.objectives.advantages import advantages_of_several, leave_one_out
from diffalign.pair_rules.above_gap import AboveGap
from diffalign.pair_rules.rejection import Rejection
from diffalign.pair_rules.reliable import Reliable
from diffalign.rewards.yes_no import YesNo
from diffalign.rollouts.response_advantages import ResponseAdvantages
from diffalign.rollouts.response_pairs import ResponsePairs
from diffalign.rollouts.self_play import SelfPlay
from tests.rollouts.letters import Vowels
from tests.rollouts.response_questions import write_questions
from tests.rollouts.runs import row_metadata
from tests.runs import Killed, files
from tests.tiny_vlm import tiny_llava, tiny_qwen2_vl

FAMILIES = {"llava": tiny_llava, "qwen2_vl": tiny_qwen2_vl}
KINDS = (ResponseAdvantages, ResponsePairs, SelfPlay)


@cache
def settings(family="llava"):
    return VLM(path=str(FAMILIES[family](Path(mkdtemp()))))


@cache
def model(family="llava", reference="none"):
    return settings(family).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference=reference
    )


def rollouts(folder, kind=ResponseAdvantages, questions=None, **changes):
    made = {
        "questions": QuestionConfig(path=str(questions or write_questions(folder)), kind="trl"),
        "questions_per_round": 4,
        "questions_per_batch": 3,
        "responses_per_question": 4,
        "max_new_tokens": 5,
    }
    made |= {} if kind is SelfPlay else {"rewards": (Vowels(),)}
    return kind(**{**made, **changes})


def start(rollouts, folder, *, family="llava", loaded=None, **layout):
    run = row_metadata(folder / "rounds", model=settings(family), **layout)
    source = rollouts.open(run)
    source.bind(loaded or model(family))
    return source


def groups(folder, number=0):
    return read_json_lines(folder / f"rounds/round-{number:04d}/responses.jsonl")


def rows(folder, number=0):
    return read_json_lines(folder / f"rounds/round-{number:04d}/rows.jsonl")


def sampled(folder, number=0):
    found = sorted((folder / f"rounds/round-{number:04d}/sampled").glob("*.jsonl"))
    return {row["visit"]: row for path in found for row in read_json_lines(path)}


def of_round(source, folder, number=0):
    """All batches of its first round, of one row each."""
    first = next(iter(source))
    return [first, *islice(source, len(rows(folder, number)) - 1)]


def responses_of(batch, view):
    tokens = batch.responses[view]
    return [
        ids[mask].tolist() for ids, mask in zip(tokens.input_ids, tokens.response_mask, strict=True)
    ]


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_on_is_the_very_tokens_that_were_sampled(tmp_path, family):
    source = start(rollouts(tmp_path), tmp_path, family=family)
    batches = of_round(source, tmp_path)
    known, by_id = sampled(tmp_path), {row["sample_id"]: row for row in rows(tmp_path)}
    assert len(batches) == 16
    for batch in batches:
        (name,) = batch.sample_ids
        row = by_id[name]
        assert responses_of(batch, "sampled") == [
            known[row["visit"]]["tokens"][row["responses"]["sampled"]]
        ]
        assert batch.strength["advantage"].tolist() == [pytest.approx(row["advantage"])]
    assert len({tuple(t) for row in known.values() for t in row["tokens"]}) > 8


def test_responses_are_those_of_the_policy_at_temperature_1(tmp_path):
    """The first tokens of many samples are as frequent as the policy finds them probable."""
    one = rollouts(
        tmp_path,
        questions=write_questions(tmp_path, 1),
        questions_per_round=1,
        responses_per_question=600,
        max_new_tokens=1,
    )
    next(iter(start(one, tmp_path)))
    tokens = [tokens[0] for tokens in sampled(tmp_path)[0]["tokens"]]
    frequency = torch.bincount(torch.tensor(tokens), minlength=200) / len(tokens)
    prompt = ChatEncoder(model().processor)
    question = groups(tmp_path)[0]["question"]
    assert question == "What is it?"
    batch = next(iter(start(one, tmp_path)))
    first = batch.responses["sampled"]
    ends = first.attention_mask.sum(dim=1) - 1
    assert prompt.pad_token_id >= 0
    with torch.no_grad(), model().inference() as network:
        made = network.model(
            input_ids=first.input_ids[:1, : int(ends[0])],
            attention_mask=first.attention_mask[:1, : int(ends[0])],
            **batch.images_of("sampled", None),
        )
    probable = made.logits[0, -1].float()
    probable[model().placeholders] = -torch.inf
    probable = probable.softmax(dim=-1)
    count = min(len(probable), len(frequency))
    assert float((probable[:count] - frequency[:count]).abs().max()) < 0.06
    assert float(probable.max()) > 0.06


def test_a_response_depends_on_its_own_seed_alone(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    path = write_questions(tmp_path)
    for folder, at_once in ((alone, 1), (together, 4)):
        next(iter(start(rollouts(tmp_path, questions=path, questions_per_batch=at_once), folder)))
    assert sampled(alone) == sampled(together)
    assert groups(alone) == groups(together)


def test_rounds_visit_other_questions_with_other_samples(tmp_path):
    source = start(rollouts(tmp_path), tmp_path)
    list(islice(source, 17))
    first, second = groups(tmp_path), groups(tmp_path, 1)
    assert len({g["question_id"] for g in first + second}) == 6
    both = {g["question_id"] for g in first} & {g["question_id"] for g in second}
    texts = [{g["question_id"]: g["texts"] for g in some} for some in (first, second)]
    assert both and all(texts[0][name] != texts[1][name] for name in both)


def test_a_question_that_cannot_be_asked_is_counted(tmp_path):
    path = write_questions(tmp_path, images=["gone.png"])
    source = start(rollouts(tmp_path, questions=path, questions_per_round=6), tmp_path)
    batches = of_round(source, tmp_path)
    assert len(batches) == 20
    (gone,) = [group for group in groups(tmp_path) if group["unusable"]]
    assert "gone.png" in gone["unusable"] and not gone["texts"]
    assert any("cannot be used" in reason for reason in source.skipped_counts)


def test_a_question_that_a_reward_cannot_read_is_left_out(tmp_path):
    chosen = rollouts(tmp_path, rewards=(Vowels(word="Look!"),), questions_per_round=6)
    source = start(chosen, tmp_path)
    next(iter(source))
    (left,) = [group for group in groups(tmp_path) if group["unusable"]]
    assert left["unusable"] == "letters cannot score it: it does not say Look!"
    assert not left["texts"]


def test_watched_rewards_change_nothing_but_the_figures(tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    path = write_questions(tmp_path)
    sources = [
        start(rollouts(tmp_path, questions=path, watch=watch), folder)
        for folder, watch in ((plain, ()), (watched, (Vowels(alike=True),)))
    ]
    for source in sources:
        next(iter(source))
    assert rows(plain) == rows(watched)
    assert sources[1].figures()["round/watched/letters_mean"] == 0.5
    assert sources[0].fingerprint() == sources[1].fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_keep_their_log_probabilities_where_a_round_has_several_steps(tmp_path, family):
    loaded = settings(family).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    several = start(
        rollouts(tmp_path), tmp_path / "s", family=family, loaded=loaded, samples_per_device=4
    )
    one = start(
        rollouts(tmp_path), tmp_path / "o", family=family, loaded=loaded, samples_per_device=16
    )
    likelihood = Tokens(each_token=True)
    for place, batch in enumerate(islice(several, 2)):
        prepared = likelihood.prepare(loaded, batch)
        with torch.no_grad():
            likelihood.evaluate(loaded, prepared)
            tokens = likelihood.token_likelihoods(prepared)["sampled"]
            apart = (tokens.log_ratio * tokens.weights).abs().max()
            assert apart < 1e-5 if place == 0 else apart > 1e-3
            for _, parameter in loaded.trained_parameters():
                parameter *= 1.02
        assert (batch.old_log_probs["sampled"] != 0).sum() == tokens.weights.sum()
    assert next(iter(one)).old_log_probs == {}


# --- advantages ---------------------------------------------------------------------------------


def advantages(folder):
    found = torch.zeros(4, 4, dtype=torch.float64)
    for row in rows(folder):
        found[row["visit"], row["responses"]["sampled"]] = row["advantage"]
    return found


def earned(folder, *names):
    nothing = float("nan")
    each = [[group["rewards"][name] for group in groups(folder)] for name in names]
    values = [[[nothing if v is None else v for v in group] for group in by] for by in each]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, lambda r: advantages_of_several(r, (1.0,))),
        ({"scale": "batch"}, lambda r: advantages_of_several(r, (1.0,), scale="batch")),
        ({"scale": "none"}, lambda r: advantages_of_several(r, (1.0,), scale="none")),
        ({"baseline": "others"}, lambda r: leave_one_out(r[0])),
        (
            {"baseline": "others", "scale": "batch"},
            lambda r: leave_one_out(r[0], normalize=True),
        ),
    ],
)
def test_advantages_are_those_of_their_definition(tmp_path, change, expected):
    next(iter(start(rollouts(tmp_path, **change), tmp_path)))
    want = expected(earned(tmp_path, "letters"))
    torch.testing.assert_close(advantages(tmp_path), want)
    assert (want != 0).any()


def test_two_rewards_are_weighed(tmp_path):
    both = (Vowels(), Vowels(alike=True))
    chosen = rollouts(tmp_path, rewards=both, reward_weights=(2.0, 5.0), scale="none")
    next(iter(start(chosen, tmp_path)))
    want = advantages_of_several(earned(tmp_path, "letters"), (2.0,), scale="none")
    torch.testing.assert_close(advantages(tmp_path), want)
    assert set(groups(tmp_path)[0]["rewards"]) == {"letters", "letters_2"}


def test_groups_of_equal_rewards_are_kept_or_dropped(tmp_path):
    """With two responses of one token, some pairs earn the same."""
    small = {"responses_per_question": 2, "max_new_tokens": 1, "questions_per_round": 6}
    path = write_questions(tmp_path)
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    for folder, rule in ((kept, "keep"), (dropped, "drop")):
        next(iter(start(rollouts(tmp_path, questions=path, equal_groups=rule, **small), folder)))
    equal = sum(len(set(group["rewards"]["letters"])) == 1 for group in groups(kept))
    assert 0 < equal < 6
    assert len(rows(kept)) == 12
    assert len(rows(dropped)) == 12 - 2 * equal
    assert all(row["advantage"] for row in rows(dropped))


@pytest.mark.parametrize("kind", [ResponseAdvantages, ResponsePairs])
def test_a_run_without_any_difference_ends_with_a_sentence(tmp_path, kind):
    hopeless = rollouts(tmp_path, kind, rewards=(Vowels(alike=True),), questions_per_round=1)
    with pytest.raises(DataError, match=r"10 rounds in a row .* 0 of 1 questions with differing"):
        next(iter(start(hopeless, tmp_path)))


def test_a_step_along_the_advantages_raises_what_earned_more(tmp_path):
    loaded = settings().load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    batch = next(iter(start(rollouts(tmp_path), tmp_path, loaded=loaded, samples_per_device=16)))
    likelihood, weights = Tokens(), batch.strength["advantage"]

    def gain():
        values = likelihood.evaluate(loaded, likelihood.prepare(loaded, batch))["sampled"]
        return (values * weights).sum()

    before = gain()
    before.backward()
    with torch.no_grad():
        for _, parameter in loaded.trained_parameters():
            if parameter.grad is not None:
                parameter += 1e-4 * parameter.grad
        assert gain() > before


# --- pairs --------------------------------------------------------------------------------------


def test_the_better_response_is_chosen(tmp_path):
    source = start(rollouts(tmp_path, ResponsePairs), tmp_path)
    batches = of_round(source, tmp_path)
    known = {group["visit"]: group["rewards"]["letters"] for group in groups(tmp_path)}
    for row in rows(tmp_path):
        scores = [score for score in known[row["visit"]] if score is not None]
        places = row["responses"]
        assert known[row["visit"]][places["chosen"]] == max(scores)
        assert known[row["visit"]][places["rejected"]] == min(scores)
    assert len(batches) == len(rows(tmp_path)) > 2
    assert all(set(batch.responses) == {"chosen", "rejected"} for batch in batches)
    assert all(batch.strength == {} for batch in batches)


@pytest.mark.parametrize(
    "rule", [AboveGap(gap=0.1, most=2), Rejection(beta=0.2, keep=4)], ids=["above_gap", "rejection"]
)
def test_other_rules_pair_what_images_are_paired_by(tmp_path, rule):
    next(iter(start(rollouts(tmp_path, ResponsePairs, pairs=rule), tmp_path)))
    known = {group["visit"]: group["rewards"]["letters"] for group in groups(tmp_path)}
    made = rows(tmp_path)
    least = getattr(rule, "gap", 0.0)
    for row in made:
        scores, places = known[row["visit"]], row["responses"]
        assert scores[places["chosen"]] - scores[places["rejected"]] > least
    assert made and max(sum(r["visit"] == v for r in made) for v in known) == 2


def test_a_gap_becomes_a_preference(tmp_path):
    soft = rollouts(tmp_path, ResponsePairs, gap_temperature=0.2, offline_share=0.4)
    batches = of_round(start(soft, tmp_path), tmp_path)
    assert len({tuple(batch.strength) for batch in batches}) == 1
    found = [float(batch.strength["preference"]) for batch in batches]
    offline = [batch.sample_ids[0].endswith("offline") for batch in batches]
    assert any(offline) and not all(offline)
    assert all(p == 1 if own else 0.5 < p < 1 for p, own in zip(found, offline, strict=True))


def test_some_visits_take_the_pair_of_the_data(tmp_path):
    path = write_questions(tmp_path)
    mixed = rollouts(
        tmp_path, ResponsePairs, questions=path, offline_share=0.5, questions_per_round=6
    )
    source = start(mixed, tmp_path)
    batches = of_round(source, tmp_path)
    own = [group for group in groups(tmp_path) if not group["texts"]]
    assert 0 < len(own) < 6
    assert source.figures()["round/offline"] == len(own)
    tokenizer = model().processor.tokenizer
    written = {row["prompt"][0]["content"][1]["text"]: row for row in read_json_lines(path)}
    asked = {group["visit"]: group["question"] for group in own}
    by_id = {row["sample_id"]: row for row in rows(tmp_path)}
    shown = 0
    for batch in batches:
        row = by_id[batch.sample_ids[0]]
        if row["visit"] not in asked:
            continue
        shown += 1
        data = written[asked[row["visit"]]]
        for view in ("chosen", "rejected"):
            (tokens,) = responses_of(batch, view)
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert text == data[view][0]["content"]
    assert shown == len(own)


def test_with_pairs_of_the_data_alone_nothing_is_sampled(tmp_path):
    offline = rollouts(tmp_path, ResponsePairs, offline_share=1.0)
    batches = of_round(start(offline, tmp_path), tmp_path)
    assert len(batches) == 4 and not any(group["texts"] for group in groups(tmp_path))


def test_self_play_sets_the_data_above_the_policy(tmp_path):
    play = rollouts(tmp_path, SelfPlay, responses_per_question=2, reference="initial")
    batches = of_round(start(play, tmp_path), tmp_path)
    assert len(batches) == 8
    known, by_id = sampled(tmp_path), {row["sample_id"]: row for row in rows(tmp_path)}
    texts = {group["visit"]: group["response"] for group in groups(tmp_path)}
    tokenizer = model().processor.tokenizer
    for batch in batches:
        row = by_id[batch.sample_ids[0]]
        own = known[row["visit"]]["tokens"][row["responses"]["rejected"]]
        assert responses_of(batch, "rejected") == [own]
        (chosen,) = responses_of(batch, "chosen")
        assert tokenizer.decode(chosen, skip_special_tokens=True).strip() == texts[row["visit"]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_round_may_be_compared_with_the_policy_that_sampled_it(tmp_path, kind):
    loaded = settings().load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="past_policy"
    )
    source = start(
        rollouts(tmp_path, kind, reference="latest", questions_per_round=2), tmp_path, loaded=loaded
    )
    likelihood, batches = Tokens(), iter(source)
    for number in range(2):
        batch = next(batches)
        while not batch.sample_ids[0].startswith(f"round-{number}/"):
            batch = next(batches)
        prepared = likelihood.prepare(loaded, batch)
        with torch.no_grad():
            policy = likelihood.evaluate(loaded, prepared)
            with loaded.reference():
                reference = likelihood.evaluate(loaded, prepared)
            for view in policy:
                torch.testing.assert_close(policy[view], reference[view])
            for _, parameter in loaded.trained_parameters():
                parameter *= 1.05
            with loaded.reference():
                again = likelihood.evaluate(loaded, likelihood.prepare(loaded, batch))
        for view in policy:
            torch.testing.assert_close(again[view], reference[view], rtol=1e-3, atol=1e-3)


# --- killed, resumed ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ResponseAdvantages, ResponsePairs])
def test_killed_at_any_write_a_round_comes_out_the_same(tmp_path, monkeypatch, kind):
    small = rollouts(tmp_path, kind, questions_per_round=2, questions_per_batch=1, max_new_tokens=3)

    def first_batch(folder):
        return next(iter(start(small, folder)))

    whole = first_batch(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    replace, writes = Path.replace, 0
    while True:
        left = writes

        def failing(draft, target):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return replace(draft, target)

        monkeypatch.setattr(Path, "replace", failing)
        folder = tmp_path / str(writes)
        try:
            first_batch(folder)
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
            batch = first_batch(folder)
            assert batch.sample_ids == whole.sample_ids
            found = {n: content for n, content in files(folder).items() if ".part" not in n}
            assert found == expected, f"killed at write {writes}"
        else:
            break
        writes += 1
    assert writes == 1 + 2 * 2 + 3  # started; samples and rewards of 2 batches; the round's own


def test_a_run_goes_on_in_the_middle_of_a_round(tmp_path):
    source = start(rollouts(tmp_path), tmp_path)
    list(islice(source, 5))
    state = source.state_dict()
    rest = [batch.sample_ids for batch in islice(source, 6)]
    again = start(rollouts(tmp_path), tmp_path)
    again.load_state_dict(state)
    assert [batch.sample_ids for batch in islice(again, 6)] == rest


def test_what_only_training_needed_is_released(tmp_path):
    source = start(rollouts(tmp_path), tmp_path)
    list(islice(source, 17))
    source.release(source.state_dict())
    assert not list((tmp_path / "rounds/round-0000/sampled").iterdir())
    assert not list((tmp_path / "rounds/round-0000/rewards").iterdir())
    assert len(groups(tmp_path)) == 4 and sampled(tmp_path, 1)


# --- settings -----------------------------------------------------------------------------------


def test_questions_and_rewards_identify_what_is_read(tmp_path):
    path, other = write_questions(tmp_path), tmp_path / "other"
    other.mkdir()
    prints = [
        start(rollouts(tmp_path, questions=some), tmp_path).fingerprint()
        for some in (path, path, write_questions(other, 5))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_reward_that_reads_no_question_is_refused_before_weights(tmp_path):
    with pytest.raises(DataError, match=r"none of the first 6 .* it does not say nowhere"):
        start(rollouts(tmp_path, rewards=(Vowels(word="nowhere"),)), tmp_path)
    one = write_questions(tmp_path, 1)
    with pytest.raises(DataError, match=r"yes_no cannot .* neither yes nor no: 'a red cat'"):
        start(rollouts(tmp_path, rewards=(YesNo(),), questions=one), tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ResponseAdvantages, {"rewards": ()}, "rewards is empty: name at least one"),
        (ResponsePairs, {"rewards": ()}, "rewards is empty: name at least one"),
        (ResponseAdvantages, {"responses_per_question": 1}, "set it to 2 or more"),
        (ResponsePairs, {"responses_per_question": 1}, "set it to 2 or more"),
        (ResponseAdvantages, {"temperature": 0.7}, "leave it at 1"),
        (ResponsePairs, {"temperature": 0}, "must be greater than 0, got 0: responses would all"),
        (ResponsePairs, {"offline_share": 1.5}, "offline_share must be between 0 and 1"),
        (ResponsePairs, {"pairs": Reliable()}, "pairs is reliable, which people's labels choose"),
        (ResponseAdvantages, {"reward_weights": (1.0, 2.0)}, "has 2 numbers, and there are 1"),
        (
            ResponseAdvantages,
            {"baseline": "others", "scale": "group"},
            "set scale to batch or none, or baseline to mean",
        ),
        (
            ResponseAdvantages,
            {"baseline": "others", "combine": "normalize_then_sum"},
            "which is of baseline mean",
        ),
        (SelfPlay, {"rewards": (Vowels(),)}, "take kind response_pairs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, kind, change, message):
    with pytest.raises(ValueError, match=message):
        rollouts(tmp_path, kind, **change)


def test_a_run_says_what_it_is_about_to_do(tmp_path):
    assert rollouts(tmp_path).describe() == "rounds of 4 questions x 4 responses, scored by letters"
    mixed = rollouts(tmp_path, ResponsePairs, offline_share=0.25)
    assert mixed.describe().endswith("paired by best_worst, 25% of the data's own pairs")
    assert "the data's response to each against 4 of" in rollouts(tmp_path, SelfPlay).describe()
    lines = start(rollouts(tmp_path), tmp_path, samples_per_device=4).describe()
    assert lines[1:] == [
        "6 questions; 4 rows an optimiser step",
        "a round trains at most 4 optimiser steps; from the second on a loss that clips "
        "compares the policy, token by token, with the one that sampled",
    ]
    (*_, line) = start(rollouts(tmp_path), tmp_path, samples_per_device=16).describe()
    assert line == "every optimiser step trains on responses of the policy that it moves"
