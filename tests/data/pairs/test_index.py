import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DataError
from tests.data.conftest import open_source, take
from tests.layouts import (
    encoded,
    make_pairs,
    pickapic_rows,
    solid_image,
    write_pickapic,
    write_rows,
)


def test_buckets_give_both_sides_one_shape_a_batch(tmp_path):
    shapes = [(32, 32)] * 4 + [(52, 32)] * 3 + [(60, 34)] * 2
    pairs = [pair for i, size in enumerate(shapes) for pair in make_pairs(i + 1, size=size)[i:]]
    write_pickapic(tmp_path, pairs)
    source = open_source(tmp_path, buckets=True, resolution=32, pairs_per_device=3)
    batches = take(source, 9)
    seen = set()
    for batch in batches:
        chosen, rejected = (batch.images[view].shape for view in ("chosen", "rejected"))
        assert chosen == rejected
        height, width = chosen[2:]
        sizes = batch.original_sizes["chosen"]
        assert ((sizes[:, 1] > sizes[:, 0]) == (width > height)).all()
        seen.add((height, width))
    assert seen == {(32, 32), (24, 40)}
    assert "2 buckets of height x width 24x40, 32x32" in source.describe()[1]


def test_a_side_of_unreadable_size_is_listed_and_its_pair_left_out(tmp_path):
    rows = pickapic_rows(make_pairs(4))
    rows[0]["jpg_1"] = b"garbage"
    write_rows(tmp_path / "x.parquet", rows)
    source = open_source(tmp_path, buckets=True, max_bad_fraction=0.5, pairs_per_device=3)
    assert source.skipped_counts == {"corrupt image": 1}
    (batch,) = take(source, 1)
    assert sorted(name[:4] for name in batch.sample_ids) == ["1001", "1002", "1003"]


def test_an_image_with_a_long_header_is_sized_all_the_same(tmp_path):
    buffer = io.BytesIO()
    solid_image((9, 9, 9), size=(60, 34)).save(buffer, "JPEG", icc_profile=bytes(200_000))
    assert len(buffer.getvalue()) > 200_000
    rows = [{**row, "jpg_0": buffer.getvalue()} for row in pickapic_rows(make_pairs(1))]
    rows[0]["jpg_1"] = encoded(Image.new("RGB", (60, 34)))
    write_rows(tmp_path / "x.parquet", rows)
    source = open_source(tmp_path, buckets=True, resolution=32, pairs_per_device=1)
    assert take(source, 1)[0].images["chosen"].shape[2:] == (24, 40)


def test_a_set_without_a_readable_size_is_refused(tmp_path):
    rows = [{**row, "jpg_0": b"garbage"} for row in pickapic_rows(make_pairs(2))]
    write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError, match="images whose size can be read"):
        open_source(tmp_path, buckets=True)


def test_indexing_reads_no_image(tmp_path):
    """A table of 20 MB of images is indexed within 2 MB."""
    blob = np.random.default_rng(0).bytes(100_000)
    rows = [{**row, "jpg_0": blob, "jpg_1": blob} for row in pickapic_rows(make_pairs(100))]
    write_rows(tmp_path / "x.parquet", rows, row_group_size=10)
    open_source(tmp_path)  # converts to Arrow, once
    tracemalloc.start()
    try:
        source = open_source(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source.describe()[1] == "100 rows: 100 pairs"
    assert peak < 2_000_000
