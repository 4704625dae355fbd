from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffalign.synthesis.images import ImageStore
from tests.responses import random_image


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
