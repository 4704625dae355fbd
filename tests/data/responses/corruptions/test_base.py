from dataclasses import dataclass

import pytest

from diffalign import components, config
from diffalign.data.responses.corruptions.base import AbstractCondition, Origin
from diffalign.data.responses.corruptions.crop import Crop
from diffalign.data.responses.corruptions.random import Random
from diffalign.data.responses.corruptions.replaced import Replaced
from diffalign.data.responses.corruptions.zero import Zero
from diffalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Conditions:
    conditions: dict[str, AbstractCondition]


def test_every_kind_is_found_by_its_module():
    assert components.kinds(AbstractCondition) == [
        "block_mask",
        "crop",
        "diffuse",
        "noise",
        "pixel_mask",
        "random",
        "replaced",
        "zero",
    ]


def test_conditions_are_read_from_a_config_by_name():
    given = ["conditions={half: {kind: crop, largest: 0.5}, empty: {kind: zero}}"]
    loaded = config.load(Conditions, overrides=given)
    assert loaded.conditions == {"half": Crop(largest=0.5), "empty": Zero()}


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="Did you mean crop"):
        config.load(Conditions, overrides=["conditions={a: {kind: crpo}}"])


def test_where_images_come_from():
    assert Crop().origin is Origin.OWN
    assert Replaced().origin is Origin.ROW
    assert Random().origin is Origin.ANOTHER
