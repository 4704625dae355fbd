import json
from pathlib import Path

import pytest

from diffalign import config
from diffalign.data.lanes import cut_into_lanes, deal, lane_of, taken_from
from diffalign.data.layout import Layout
from diffalign.jobs import train
from diffalign.training.config import RunConfig
from tests.layouts import make_pairs, write_pickapic
from tests.processes import run_ranks

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"


def test_a_part_goes_to_the_lane_with_the_least():
    assert deal([5, 2, 2, 2, 4], 2) == [[0, 4], [1, 2, 3]]
    assert deal([2, 2, 2, 2], 4) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("micro_batch", "micro_batches", "parts", "cut"),
    [
        (1, 1, 100, (1, 1)),
        (8, 1, 100, (8, 1)),
        (8, 1, 4, (4, 2)),
        (8, 1, 5, (1, 8)),
        (2, 12, 240, (24, 1)),  # the lanes of a step of 24 samples
        (2, 12, 100, (8, 1)),  # 24 of them would be of four parts or five
        (80, 1, 80, (20, 4)),  # and not 16, which five processes could not share
        (64, 32, 1000, (32, 2)),
        (7, 1, 4, (1, 7)),
        (8, 1, 0, (1, 8)),
    ],
)
def test_lanes_follow_from_the_step_and_the_parts(micro_batch, micro_batches, parts, cut):
    layout = Layout(samples_per_device=1, micro_batch=micro_batch, micro_batches=micro_batches)
    assert cut_into_lanes(layout, [1] * parts) == cut


@pytest.mark.parametrize(
    ("processes", "held_mb", "lanes"),
    [(1, 500, 1), (1, 100, 4), (4, 500, 4), (5, 500, 5), (5, 1, 20), (8, 500, 8), (1, 1, 20)],
)
def test_parts_that_take_much_memory_make_few_lanes(processes, held_mb, lanes, as_rank):
    as_rank(0, processes)
    layout = Layout(samples_per_device=1, micro_batch=40, micro_batches=1)
    assert cut_into_lanes(layout, [1] * 80, held_bytes=held_mb * 10**6)[0] == lanes


@pytest.mark.parametrize(("lanes", "turn"), [(1, 1), (3, 2), (8, 1), (4, 5)])
def test_every_lane_gives_its_samples_in_turn_and_none_twice(lanes, turn):
    taken = [0] * lanes
    for sample in range(100):
        assert [taken_from(sample, lane, lanes, turn) for lane in range(lanes)] == taken
        rounds, (lane, within) = lane_of(sample, lanes, turn)
        assert rounds * turn + within == taken[lane]
        taken[lane] += 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_tell_each_other_where_their_lanes_are(tmp_path, tiny_sd15):
    write_pickapic(tmp_path / "data", make_pairs(24), files=6)
    overrides = [
        f"data={{kind: auto, path: {tmp_path / 'data'}, resolution: 32, streaming: true}}",
        *("data.shuffle_block=4", "data.workers=0", f"model.path={tiny_sd15}"),
        *("model.kind=sd15", "training.optimizer_steps=3"),
        *("training.samples_per_device=1", "training.checkpoint_every=3"),
    ]
    places = []
    for name, more in (("one", ["training.accumulation=2"]), ("two", ["training.accumulation=1"])):
        output = tmp_path / name
        run = config.load(RunConfig, SMOKE, [*overrides, *more, f"output={output}"])
        config.save(run, tmp_path / f"{name}.yaml")
        if name == "one":
            train.run(run)
        else:
            run_ranks("train", str(tmp_path / f"{name}.yaml"), log=tmp_path / "log")
        state = json.loads((output / "checkpoint-3/state.json").read_text())
        places.append(state["source"]["lanes"])
    assert [lane["offset"] + 4 * lane["block"] for lane in places[1]] == [3, 3]
    assert places[0] == places[1]
