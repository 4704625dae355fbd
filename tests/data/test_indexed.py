import pyarrow as pa
import torch

from tests.data.conftest import open_source
from tests.layouts import make_pairs, pickapic_rows, write_rows


def test_indexing_reads_no_image(tmp_path):
    """A table of 20 MB of images is indexed within 2 MB."""
    blob = torch.randint(0, 255, (100_000,), dtype=torch.uint8).numpy().tobytes()
    rows = [{**row, "jpg_0": blob, "jpg_1": blob} for row in pickapic_rows(make_pairs(100))]
    write_rows(tmp_path / "x.parquet", rows, row_group_size=10)
    open_source(tmp_path)  # converts to Arrow, once
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    source = open_source(tmp_path)
    assert pool.bytes_allocated() - before < 2_000_000
    assert source.describe()[1] == "100 rows: 100 pairs"
