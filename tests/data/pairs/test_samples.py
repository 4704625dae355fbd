import pytest
import torch

from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.samples import Sample, SampleMaker, empty_caption, stack, with_unit_range
from diffalign.data.pairs.transforms import CutImage
from diffalign.data.skipping import Skipped, SkipReason
from diffalign.timesteps import TimestepSampling
from tests.layouts import encoded, solid_image


def maker(run_seed=0, **settings):
    return SampleMaker(
        config=PairConfig(path="x", resolution=16, **settings),
        views=("chosen", "rejected"),
        run_seed=run_seed,
        timesteps=TimestepSampling(),
        schedule_length=1000,
    )


def pair(name="s", chosen=(40, 16), rejected=(80, 32)):
    return ImagePair(
        sample_id=name,
        prompt="a prompt",
        chosen=encoded(solid_image((200, 0, 0), size=chosen)),
        rejected=encoded(solid_image((0, 0, 200), size=rejected)),
    )


def fingerprint(sample):
    return (
        sample.prompt,
        sample.timestep,
        sample.noise_seed,
        dict(sample.encoding_seeds),
        [(image.corner, image.pixels.tolist()) for image in sample.images.values()],
    )


def test_a_sample_is_a_function_of_run_seed_id_and_sample():
    make = maker(crop="random").make
    assert fingerprint(make(pair(), 3, (16, 16))) == fingerprint(make(pair(), 3, (16, 16)))


@pytest.mark.parametrize(("run_seed", "name", "visit"), [(1, "s", 3), (0, "other", 3), (0, "s", 4)])
def test_each_of_the_three_changes_every_random_choice(run_seed, name, visit):
    first = maker().make(pair(), 3, (16, 16))
    second = maker(run_seed).make(pair(name), visit, (16, 16))
    assert first.timestep != second.timestep
    assert first.noise_seed != second.noise_seed
    assert first.encoding_seeds != second.encoding_seeds


def test_after_so_many_visits_every_random_choice_comes_again():
    make = maker(crop="random", caption_dropout=0.5, visits=3).make
    first = [make(pair(chosen=(64, 16), rejected=(64, 16)), visit, (16, 16)) for visit in range(7)]
    assert [sample.visit for sample in first] == [0, 1, 2, 0, 1, 2, 0]
    seen = [fingerprint(sample) for sample in first]
    assert seen[:3] == seen[3:6] and seen[6] == seen[0]
    assert len({str(each) for each in seen}) == 3


def test_few_visits_are_the_first_of_many_but_for_their_times():
    few, many = maker(visits=3).make(pair(), 2, (16, 16)), maker().make(pair(), 2, (16, 16))
    assert fingerprint(few)[2:] == fingerprint(many)[2:]
    assert few.timestep != many.timestep


def test_sides_of_different_size_are_cut_at_the_same_relative_place():
    for visit in range(10):
        sample = maker(crop="random").make(pair(), visit, (16, 16))
        chosen, rejected = (sample.images[view].corner for view in ("chosen", "rejected"))
        assert chosen == rejected  # 80x32 and 40x16 are both 40x16 once resized
    assert sample.images["rejected"].original_size == (32, 80)


def test_a_bad_side_is_named():
    bad = ImagePair(sample_id="s", prompt="p", chosen=pair().chosen, rejected=b"x")
    result = maker().make(bad, 0, (16, 16))
    assert isinstance(result, Skipped)
    assert (result.sample_id, result.side, result.reason) == ("s", "rejected", SkipReason.CORRUPT)


@pytest.mark.parametrize("caption", ["", " ", "\n\t"])
def test_a_caption_of_nothing_but_space_is_empty(caption):
    assert empty_caption("s", caption).reason is SkipReason.EMPTY_CAPTION
    assert empty_caption("s", "x") is None


def test_a_caption_is_dropped_in_some_visits_of_a_pair_and_not_in_others():
    make = maker(caption_dropout=0.5).make
    assert {make(pair(), visit, (16, 16)).prompt for visit in range(20)} == {"", "a prompt"}


def sample(name, value):
    pixels = torch.full((3, 8, 16), value, dtype=torch.uint8)
    image = CutImage(pixels=pixels, original_size=(20, 30), corner=(1, 2))
    return Sample(
        sample_id=name,
        prompt="",
        caption=f"caption of {name}",
        images={"chosen": image, "rejected": image},
        target=(8, 16),
        timestep=12.5,
        visit=value // 100,
        noise_seed=value,
        encoding_seeds={"chosen": value + 1, "rejected": value + 2},
    )


def test_fields_stack_in_the_order_of_the_samples():
    batch = stack([sample("a", 0), sample("b", 255)])
    assert batch.images["chosen"].dtype == torch.uint8
    assert batch.sample_ids == ("a", "b")
    assert batch.prompts == ("", "")
    assert batch.captions == ("caption of a", "caption of b")
    assert batch.noise_seeds == (0, 255)
    assert batch.visits == (0, 2)
    assert batch.encoding_seeds == {"chosen": (1, 256), "rejected": (2, 257)}
    assert batch.timesteps.tolist() == [12.5, 12.5]
    assert batch.timesteps.dtype == torch.float64
    assert batch.original_sizes["rejected"].tolist() == [[20, 30]] * 2
    assert batch.crop_corners["rejected"].tolist() == [[1, 2]] * 2
    assert batch.crop_corners["rejected"].dtype == torch.int64


def test_images_run_from_minus_one_to_one():
    images = with_unit_range(stack([sample("a", 0), sample("b", 255)])).images["chosen"]
    assert images.shape == (2, 3, 8, 16)
    assert images.dtype == torch.float32
    assert images[0].unique().tolist() == [-1.0]
    assert images[1].unique().tolist() == [1.0]


def test_a_caption_is_dropped_as_often_as_asked_for_and_never_where_it_is_not():
    def dropped(share: float) -> float:
        make = maker(caption_dropout=share).make
        prompts = [make(pair(), visit, (8, 8)).prompt for visit in range(200)]
        return sum(prompt == "" for prompt in prompts) / len(prompts)

    assert dropped(0.0) == 0.0 and dropped(1.0) == 1.0
    assert 0.12 < dropped(0.2) < 0.28
