"""What the sections that batches come from say for themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from diffalign import config
from diffalign.data.batches import ImageBatch, StepBatch, TokenBatch
from diffalign.data.pairs.section import PairSection
from diffalign.data.responses.section import ResponseSection
from diffalign.data.section import RunParts, refusal_of, warnings_of
from diffalign.errors import ConfigError
from diffalign.rollouts.section import RolloutSection
from diffalign.training.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Shown:
    sample_id: str
    unusable: str | None = None


GOOD, BAD = Shown("a"), Shown("b", "no image: it is text")


def run_of(name: str, *overrides: str) -> RunConfig:
    return config.load(RunConfig, CONFIGS / name, list(overrides))


@pytest.mark.parametrize(
    ("name", "section", "batch", "origin", "reader"),
    [
        ("diffusion_dpo/sdxl.yaml", PairSection, ImageBatch, "data", "data"),
        ("mdpo/llava15_7b.yaml", ResponseSection, TokenBatch, "responses", "responses"),
        ("spo/sd15.yaml", RolloutSection, StepBatch, "rollouts spo", "data"),
        ("seppo/sd15.yaml", RolloutSection, ImageBatch, "rollouts seppo", "data"),
    ],
)
def test_a_run_has_one_section_that_says_what_it_gives(name, section, batch, origin, reader):
    found = run_of(name).section
    assert isinstance(found, section)
    assert (found.batch_type, found.origin, found.reader) == (batch, origin, reader)


def test_captions_are_dropped_where_the_data_section_is_read():
    assert run_of("diffusion_dpo/sdxl.yaml").section.caption_dropout == 0.2
    assert run_of("seppo/sd15.yaml", "data.caption_dropout=0.3").section.caption_dropout == 0.3
    assert run_of("spo/sd15.yaml").section.caption_dropout == 0
    assert run_of("mdpo/llava15_7b.yaml").section.caption_dropout == 0


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("diffusion_dpo/sdxl.yaml", "data=null", "nothing to train on: give data.path"),
        ("seppo/sd15.yaml", "data=null", "nothing to train on: give data.path"),
        ("mdpo/llava15_7b.yaml", "data={path: x, resolution: 64}", "a section data as well"),
        (
            "mdpo/llava15_7b.yaml",
            "rollouts={kind: seppo}",
            "a section rollouts as well: a run trains on responses or on images",
        ),
    ],
)
def test_no_section_and_two_of_them_are_refused(name, override, message):
    run = run_of(name, override)
    with pytest.raises(ConfigError, match=message):
        _ = run.section


def test_what_a_run_samples_itself_cannot_be_known_in_advance():
    names = ("diffusion_dpo/sdxl.yaml", "spo/sd15.yaml", "seppo/sd15.yaml", "mdpo/llava15_7b.yaml")
    kept = [run_of(name).section.kept_in_advance for name in names]
    assert kept == [True, False, False, True]


def test_a_run_that_takes_more_draws_than_there_are_is_refused_where_they_are_known_in_advance():
    name = "playground/diffusion_dpo.yaml"
    section = run_of(name, "data.visits=5").section
    assert section.describe_visits(4, reference_is_cached=True) == (
        "each pair has 5 draws of what is random (data.visits), of which this run takes 4 at most"
    )
    assert "up to 6 times: they come again" in section.describe_visits(6, reference_is_cached=False)
    assert "come again" not in section.describe_visits(None, reference_is_cached=False)
    with pytest.raises(ConfigError, match=r"data.visits is 5, and .* up to 6 times.*Set data.visi"):
        section.describe_visits(6, reference_is_cached=True)
    again = run_of(name, "data.visits=5", "data.reuse_visits=true").section
    assert "come again" in again.describe_visits(6, reference_is_cached=True)
    assert run_of(name).section.describe_visits(6, reference_is_cached=False) == ""


def test_visits_in_advance_are_those_of_random_conditions():
    section = run_of("mdpo/llava15_7b.yaml", "responses.visits=4").section
    assert section.visits_in_advance(frozenset({"chosen", "chosen@crop"})) == 4
    assert section.visits_in_advance(frozenset({"chosen", "rejected"})) == 1
    anew = run_of("mdpo/llava15_7b.yaml").section
    assert anew.visits_in_advance(frozenset({"chosen"})) == 1
    with pytest.raises(ConfigError, match=r"under crop, which .* null samples anew"):
        anew.visits_in_advance(frozenset({"chosen@crop"}))


def test_few_visits_and_strata_of_times_are_refused_together():
    run = run_of("diffusion_dpo/sdxl.yaml", "data.visits=4", "likelihood.timesteps.strata=8")
    parts = RunParts(model=run.model, likelihood=run.likelihood, objective=run.objective)
    with pytest.raises(ConfigError, match=r"strata is 8, and data.visits is 4, which spreads"):
        run.section.check(parts)


def test_the_reference_depends_on_the_conditions_that_are_seen_and_on_no_other():
    section = run_of("mdpo/llava15_7b.yaml").section
    assert set(section.defining_settings(frozenset({"chosen"}))) == {
        "responses.kind",
        "responses.columns",
        "responses.max_length",
    }
    crop = section.defining_settings(frozenset({"chosen@crop"}))["responses.conditions.crop"]
    assert crop["kind"] == "crop"


def test_some_unusable_rows_are_a_warning_and_all_of_them_an_error():
    assert warnings_of([GOOD, GOOD], "data", 0.01) == []
    assert warnings_of([GOOD, BAD], "data", 0.01) == [
        "1 of the 2 pairs shown cannot be used: a run stops once more than "
        "data.max_bad_fraction = 0.01 of all are so"
    ]
    assert refusal_of([GOOD, BAD], "data", fix="path") is None
    assert refusal_of([], "data", fix="path") is None
    assert warnings_of([BAD], "data", 0.01) == []
    assert "none of the first 1 pairs can be used, for example b: no image" in str(
        refusal_of([BAD], "data", fix="path")
    )
