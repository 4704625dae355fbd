"""The cost model of scripts/scale_model.py, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.runs import SCRIPTS, run_script

GIB = 2**30


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import scale_model

    return scale_model


@pytest.fixture
def way(model):
    """One TFLOP a pair, half of it backward; 1 GB of gradients; 10 GB of weights and state."""
    return model.Way(
        name="made up",
        work={"encode": 0.0, "reference": 0.0, "policy": 0.5e12, "backward": 0.5e12},
        parts={
            "trained weights": 10**9,
            "gradients": 10**9,
            "optimiser state": 2 * 10**9,
            "activations": GIB,
        },
        further=GIB,
        read=1e6,
        decodes=False,
        streams=False,
    )


@pytest.fixture
def cluster(model):
    return replace(
        model.Cluster(),
        peak_tflops=100,
        mfu=0.5,
        nvlink_gb_s=100,
        network_gb_s=10,
        hop_us=0,
        store_gb_s=1000,
        node_store_gb_s=1000,
    )


def test_compute_is_the_work_by_the_rate(model, way, cluster):
    found = model.cost(way, "DDP", 1, cluster)
    assert found.compute_s == pytest.approx(2048 * 1e12 / 50e12)
    assert found.sent_gb == 0 and found.exchange_s == 0
    assert (found.at_once, found.accumulation) == (8, 256)


def test_an_all_reduce_takes_a_ring_in_the_node_and_one_between_nodes(model, way, cluster):
    within = model.cost(way, "DDP", 8, cluster)
    assert within.sent_gb == 0
    assert within.exchange_s == pytest.approx(2 * 7 / 8 * 1 / 100)
    many = model.cost(way, "DDP", 64, cluster)
    assert many.sent_gb == pytest.approx(2 * 7 / 8 / 8)  # each card has an eighth of the gradient
    assert many.exchange_s == pytest.approx(2 * 7 / 8 / 100 + 2 * 7 / 8 / 8 / 10)


def test_the_batch_stays_and_what_is_left_is_accumulated(model, way, cluster):
    for gpus in (1, 8, 64, 1024):
        found = model.cost(way, "DDP", gpus, cluster)
        assert found.gpus * found.at_once * found.accumulation == 2048
    assert (found.at_once, found.accumulation) == (2, 1)


def test_what_the_backward_pass_does_not_cover_is_exposed(model, way, cluster):
    found = model.cost(way, "DDP", 1024, cluster)
    covered = found.compute_s / 2  # of one pass, half is backward
    assert found.exposed_s == pytest.approx(max(0, found.exchange_s - covered))
    slow = model.cost(way, "DDP", 1024, replace(cluster, network_gb_s=1))
    assert slow.exposed_s == pytest.approx(slow.exchange_s - covered) and slow.exposed_s > 0


def test_sharding_shares_weights_gradients_and_state(model, way):
    assert way.memory(1, 4) == pytest.approx(GIB + 4e9 / 4)
    assert way.memory(3, 1) == pytest.approx(3 * GIB + 4e9)
    assert way.checkpoint == 3e9


def test_lanes_of_a_stream_are_read_by_several_where_processes_are_more(model, way, cluster):
    own = model.cost(way, "DDP", 64, cluster)
    streamed = model.cost(replace(way, streams=True), "DDP", 64, cluster)
    assert streamed.read_gb_s == pytest.approx(2 * own.read_gb_s)
    choked = replace(cluster, store_gb_s=0.1)
    assert model.cost(replace(way, streams=True), "DDP", 1024, choked).bound_by == "reading"


def test_one_writer_holds_up_all(model, way, cluster):
    assert model.cost(way, "DDP", 64, cluster).checkpoint_s == pytest.approx(3 / 2)
    assert model.cost(way, "FSDP2", 64, cluster).checkpoint_s == pytest.approx(3 / 128)


def test_what_does_not_fit_has_no_cost(model, way, cluster):
    large = replace(way, parts={**way.parts, "trained weights": 200 * GIB})
    assert model.cost(large, "DDP", 8, cluster) is None
    assert model.cost(large, "FSDP2", 8, cluster) is not None
    line = model.table_of_costs([None], [("full", "DDP", 8)]).splitlines()[-1]
    assert "does not fit" in line


def test_a_number_of_gpus_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(AssertionError, match="a batch of 2,048 pairs needs a divisor of it"):
        run_script("scale_model.py", "--gpus", "3")
