import tracemalloc

import numpy as np

from tests.data.conftest import open_source
from tests.layouts import make_pairs, pickapic_rows, write_rows


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
