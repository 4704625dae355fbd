from diffalign.data.loader import PairSource
from diffalign.data.source import DataConfig
from diffalign.seeding import TimestepSampling
from tests.layouts import make_pairs, write_pickapic


def test_the_brighter_red_side_is_chosen_whichever_column_it_is_in(tmp_path):
    config = DataConfig(
        path=str(write_pickapic(tmp_path, make_pairs(6), files=2)), resolution=16, workers=0
    )
    source = PairSource.open(
        config,
        views=frozenset({"chosen", "rejected"}),
        run_seed=0,
        pairs_per_device=6,
        timesteps=TimestepSampling(),
        schedule_length=1000,
        skipped=None,
    )
    batch = next(iter(source))
    red, blue = 0, 2
    for view, colour, other in [("chosen", red, blue), ("rejected", blue, red)]:
        assert (batch.images[view][:, colour].mean(dim=(1, 2)) > -0.8).all()
        assert (batch.images[view][:, other] == -1).all()
