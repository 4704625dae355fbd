import pickle

import pytest
import torch

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.corruptions.block_mask import BlockMask
from diffalign.data.responses.corruptions.crop import Crop
from diffalign.data.responses.corruptions.diffuse import Diffuse
from diffalign.data.responses.corruptions.noise import Noise
from diffalign.data.responses.corruptions.pixel_mask import PixelMask
from diffalign.data.responses.corruptions.random import Random
from diffalign.data.responses.corruptions.replaced import Replaced
from diffalign.data.responses.corruptions.zero import Zero
from diffalign.data.responses.records import Span
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.data.responses.token_weights.changed import Changed
from diffalign.data.responses.token_weights.sentences import Sentences
from diffalign.data.skipping import Skipped, SkipReason
from diffalign.errors import ConfigError
from tests.data.encoders import FAMILIES, encoder, loaded, response_pair, user
from tests.layouts import encoded, solid_image

every_family = pytest.mark.parametrize("family", FAMILIES)
CONDITIONS = {
    "crop": Crop(),
    "diffuse": Diffuse(),
    "pixels": PixelMask(),
    "blocks": BlockMask(block=2),
    "zero": Zero(),
    "noise": Noise(sigma=50),
    "retrieved": Replaced(),
    "other": Random(),
}
WEIGHTS = {"changed": Changed(normalised=False), "kept": Sentences()}
BLUE = encoded(solid_image((0, 0, 200), size=(50, 9)))


def another(sample_id, seed):
    return encoded(solid_image((seed % 200, 200, 0), size=(9, 30)))


def maker(*views, family="llava", run_seed=0, another_image=another, **settings):
    settings = {"conditions": CONDITIONS, "weights": WEIGHTS, **settings}
    return TokenSampleMaker(
        config=ResponseConfig(path="x", **settings),
        views=frozenset(views),
        run_seed=run_seed,
        encoder=encoder(family),
        another_image=another_image,
    )


def pair(**changes):
    return response_pair(**{"other_images": {"retrieved": (BLUE,)}, **changes})


def pixels(sample, condition):
    return sample.image_inputs[condition]["pixel_values"]


def test_each_response_is_there_once_and_the_images_once_a_condition():
    sample = maker("chosen", "rejected", "chosen@crop", "chosen:changed").make(pair(), 0)
    assert set(sample.responses) == {"chosen", "rejected"}
    assert set(sample.image_inputs) == {None, "crop"}
    assert set(sample.weights) == {"chosen:changed"}
    assert sample.image_count == 1


def test_the_own_images_stay_away_where_no_view_shows_them():
    sample = maker("chosen@crop").make(pair(), 0)
    assert set(sample.image_inputs) == {"crop"}


@every_family
@pytest.mark.parametrize("name", list(CONDITIONS))
def test_a_condition_changes_pixels_and_nothing_else_that_the_model_is_given(family, name):
    images = tuple(encoded(solid_image((200, 0, 0), size=size)) for size in [(20, 12), (8, 30)])
    row = pair(
        images=images,
        turns=user("<image><image>\nWhat?"),
        other_images={"retrieved": (BLUE, BLUE)},
    )
    sample = maker("chosen", f"chosen@{name}", family=family).make(row, 0)
    own, other = sample.image_inputs[None], sample.image_inputs[name]
    assert own.keys() == other.keys()
    assert own["pixel_values"].shape == other["pixel_values"].shape
    assert own["pixel_values"].dtype == other["pixel_values"].dtype
    assert not torch.equal(own["pixel_values"], other["pixel_values"])
    for key in own.keys() - {"pixel_values"}:
        assert torch.equal(own[key], other[key])


@pytest.mark.parametrize("name", ["crop", "diffuse", "pixels", "blocks", "noise", "other"])
def test_a_condition_is_a_function_of_run_seed_sample_and_visit(name):
    view = f"chosen@{name}"
    first = pixels(maker(view).make(pair(), 3), name)
    assert torch.equal(first, pixels(maker(view, "rejected").make(pair(), 3), name))
    for run_seed, sample_id, visit in [(1, "s", 3), (0, "t", 3), (0, "s", 4)]:
        again = maker(view, run_seed=run_seed).make(pair(sample_id=sample_id), visit)
        assert not torch.equal(first, pixels(again, name))


def test_two_conditions_of_one_kind_and_two_images_of_one_row_are_corrupted_independently():
    settings = {"conditions": {"a": Diffuse(), "b": Diffuse()}}
    images = (encoded(solid_image((200, 0, 0))),) * 2
    row = pair(images=images, turns=user("<image><image>\nWhat?"))
    sample = maker("chosen", "chosen@a", "chosen@b", **settings).make(row, 0)
    noise = {name: pixels(sample, name) - pixels(sample, None) for name in "ab"}
    assert not torch.equal(noise["a"], noise["b"])
    assert not torch.equal(noise["a"][0], noise["a"][1])


@every_family
def test_zero_is_zero_and_diffusion_keeps_its_share_of_the_signal(family):
    sample = maker("chosen", "chosen@zero", "chosen@diffuse", family=family).make(pair(), 0)
    assert not pixels(sample, "zero").any()
    noise = pixels(sample, "diffuse") - 0.863017 * pixels(sample, None)
    assert noise.std() == pytest.approx(0.505175, rel=0.2)


def test_both_frames_of_a_patch_get_the_same_noise():
    sample = maker("chosen@diffuse", family="qwen2_vl").make(pair(), 0)
    frames = pixels(sample, "diffuse").unflatten(1, (3, 2, 4, 4))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])


def test_replaced_images_are_those_of_the_row_in_the_sizes_of_the_own_ones():
    retrieved = pixels(maker("chosen@retrieved").make(pair(), 0), "retrieved")
    same = encoded(solid_image((0, 0, 200), size=(50, 9)).resize((20, 12), resample=3))
    own = maker("chosen").make(pair(images=(same,)), 0)
    assert torch.equal(retrieved, pixels(own, None))


def test_text_alone_has_no_images_under_any_condition():
    row = pair(images=(), turns=user("Why?"), other_images={})
    sample = maker("chosen", *(f"chosen@{name}" for name in CONDITIONS)).make(row, 0)
    assert all(not shown for shown in sample.image_inputs.values())
    assert sample.image_count == 0


def test_weights_lie_on_the_tokens_of_the_response():
    sample = maker("chosen:changed", "rejected:changed").make(pair(), 0)
    for name in ("chosen", "rejected"):
        weights, own = sample.weights[f"{name}:changed"], sample.responses[name]
        assert weights.shape == own.input_ids.shape
        assert torch.equal(weights > 0, own.response_mask)
        assert set(weights[own.start :].tolist()) == {1.0, 5.0}


def test_weights_may_read_a_response_that_no_view_names():
    sample = maker("chosen:changed").make(pair(), 0)
    assert set(sample.responses) == {"chosen"}


def skipped(result):
    assert isinstance(result, Skipped)
    assert result.sample_id == "s"
    return result.reason, result.side


@pytest.mark.parametrize(
    ("view", "changes", "reason", "side"),
    [
        ("gold", {}, SkipReason.MISSING_RESPONSE, "gold"),
        ("chosen", {"responses": {"chosen": " "}}, SkipReason.EMPTY_RESPONSE, "chosen"),
        ("chosen", {"images": (b"x",)}, SkipReason.CORRUPT, None),
        ("chosen", {"images": (None,)}, SkipReason.MISSING_IMAGE, None),
        ("chosen", {"turns": user("no marker")}, SkipReason.MARKERS, None),
        ("chosen@retrieved", {"other_images": {}}, SkipReason.MISSING_IMAGE, "retrieved"),
        (
            "chosen@retrieved",
            {"other_images": {"retrieved": (b"x",)}},
            SkipReason.CORRUPT,
            "retrieved",
        ),
        ("chosen:kept", {}, SkipReason.UNJUDGED, "chosen"),
        (
            "rejected:kept",
            {"spans": {"rejected": (Span(start=0, end=19, label="no_hallucination"),)}},
            SkipReason.NOTHING_COUNTS,
            "rejected",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(view, changes, reason, side):
    assert skipped(maker(view).make(pair(**changes), 0)) == (reason, side)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_response_of_which_no_token_counts_is_skipped(normalised):
    weights = {"same": Changed(gamma=0, normalised=normalised)}
    made = maker("chosen:same", weights=weights).make(
        pair(responses={"chosen": "a b c", "rejected": "x y z"}), 0
    )
    assert skipped(made) == (SkipReason.NOTHING_COUNTS, "chosen")


def test_a_row_that_is_too_long_is_skipped_and_not_cut():
    result = TokenSampleMaker(
        config=ResponseConfig(path="x"),
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        encoder=encoder("llava", max_length=42),
    ).make(pair(), 0)
    assert skipped(result) == (SkipReason.TOO_LONG, "rejected")
    assert "allowed are 42" in result.detail


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("chosen@corp", r"chosen@corp needs 'corp' under responses\.conditions.*mean crop\?"),
        ("chosen:change", r"needs 'change' under responses\.weights.*mean changed\?"),
        ("gold:changed", "gold:changed: .*compare chosen and rejected"),
        ("gold:kept", "gold:kept: .*say in `kept`"),
    ],
)
def test_a_view_that_the_config_does_not_describe_is_refused(view, message):
    with pytest.raises(ConfigError, match=message):
        maker("chosen", view)


def test_images_of_other_samples_need_a_data_set_that_is_read_at_random():
    with pytest.raises(ConfigError, match="chosen@other shows images of other samples"):
        maker("chosen@other", another_image=None)


def test_a_maker_reaches_a_worker_of_its_own():
    copied = pickle.loads(pickle.dumps(maker("chosen", "chosen@crop")))
    own = maker("chosen", "chosen@crop").make(pair(), 1)
    again = copied.make(pair(), 1)
    assert torch.equal(pixels(own, "crop"), pixels(again, "crop"))
    assert loaded("llava")[1] is not copied.encoder.processor
