from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.questions import Unmade
from diffalign.data.responses.reading import open_responses
from diffalign.synthesis.base import ImageStore, Made
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


def test_a_file_stays_where_it_lies(tmp_path):
    path = tmp_path / "data" / "a.png"
    assert ImageStore(tmp_path / "out" / "x").name(path) == "../../data/a.png"
    assert not (tmp_path / "out").exists()


def test_the_content_of_a_table_gets_one_file(tmp_path):
    stream = io.BytesIO()
    random_image(0, size=(8, 8)).save(stream, "jpeg")
    store = ImageStore(tmp_path)
    name = store.name(stream.getvalue())
    assert name == store.name(stream.getvalue()) and name.endswith(".jpeg")
    assert (tmp_path / name).read_bytes() == stream.getvalue()
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_a_new_image_is_written_without_loss(tmp_path):
    image = random_image(1, size=(8, 8))
    with Image.open(tmp_path / ImageStore(tmp_path).save(image)) as kept:
        assert (np.asarray(kept) == np.asarray(image)).all()


def test_a_missing_image_has_no_name(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        ImageStore(tmp_path).name(None)
