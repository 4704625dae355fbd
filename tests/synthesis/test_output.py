from __future__ import annotations

import json

import pytest

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.reading import open_responses
from diffalign.synthesis.base import Made, Unmade
from diffalign.synthesis.images import ImageStore
from diffalign.synthesis.output import write_pairs, write_skipped
from tests.responses import random_image


def rows(tmp_path, count):
    store = ImageStore(tmp_path)
    return [
        Made(
            sample_id=f"row-{n}",
            values={
                "images": [store.save(random_image(n % 3, size=(6, 4)))],
                "prompt": [{"role": "user", "content": "<image>\nWhy?"}],
                "chosen": f"yes {n}",
                "rejected": "no",
            },
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_are_read_back_with_their_images(tmp_path, form):
    made = rows(tmp_path, 300)  # more than one row group
    path = write_pairs(tmp_path, made, format=form, image_columns=("images",))
    data = open_responses(ResponseConfig(path=str(path)))
    assert len(data.rows) == 300
    pair = data.pair(299, 0)
    assert pair.responses == {"chosen": "yes 299", "rejected": "no"}
    (image,) = pair.images
    content = image if isinstance(image, bytes) else image.read_bytes()
    assert content == (tmp_path / made[299].values["images"][0]).read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_rows_without_a_image_may_come_first(tmp_path):
    *without, one = rows(tmp_path, 301)
    for row in without:
        row.values.update(images=[], prompt=[{"role": "user", "content": "Why?"}])
    path = write_pairs(tmp_path, [*without, one], format="parquet", image_columns=("images",))
    data = open_responses(ResponseConfig(path=str(path)))
    assert [len(data.pair(number, 0).images) for number in (0, 300)] == [0, 1]


def test_what_is_skipped_is_listed(tmp_path):
    path = write_skipped(tmp_path, [Unmade(sample_id="a", reason="no", detail="why")])
    assert json.loads(path.read_text()) == {"id": "a", "reason": "no", "detail": "why"}
