import pytest

from diffalign.data.pairs.config import PairConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 100}, "resolution must be a multiple of 8"),
        ({"caption_dropout": 20}, "caption_dropout must be between 0 and 1, got 20"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction must be between 0 and 1"),
        ({"shuffle_block": 0}, "shuffle_block must be at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"buckets": True, "streaming": True}, "set streaming or buckets to false"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        PairConfig(**{"path": "x", "resolution": 64, **settings})


def test_defaults_are_those_of_the_published_training():
    config = PairConfig(path="x", resolution=512)
    assert (config.crop, config.flip, config.caption_dropout) == ("center", True, 0.2)
    assert config.labels == "by_name"
