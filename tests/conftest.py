"""Fixtures for all tests: tiny randomly initialised models, and batches for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch

from diffalign.data.batches import ImageBatch
from diffalign.seeding import derive_seed
from tests.processes import warm_python
from tests.runs import forget_accelerate
from tests.tiny_models import write_sd15, write_sdxl


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of files below on several processes, too: xdist puts those of few tests last,
    where one process then waits for the other."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over the libraries: a third of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give them back: extensions that count what is left at the end find nothing."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def arrow_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep converted tables out of the user's cache, in this process and those it starts."""
    folder = str(tmp_path_factory.mktemp("arrow-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python that has loaded the libraries: what it runs starts at once."""
    with warm_python(tmp_path_factory.mktemp("python")) as path:
        yield str(path)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """No test finds the state that another one left."""
    forget_accelerate()


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 folder of some 100 kB that predicts epsilon."""
    return write_sd15(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def tiny_sd15_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same that predicts velocity."""
    return write_sd15(tmp_path_factory.mktemp("models") / "sd15_v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder of some 100 kB that predicts epsilon."""
    return write_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sdxl_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same that predicts velocity, at zero terminal signal-to-noise ratio."""
    return write_sdxl(tmp_path_factory.mktemp("models") / "sdxl_v", prediction_type="v_prediction")


@pytest.fixture
def make_pairs() -> Callable[..., ImageBatch]:
    """Makes batches of random image pairs; a row depends on its sample id alone."""

    def make(*sample_ids: str, size: int = 32) -> ImageBatch:
        def images(view: str) -> torch.Tensor:
            rows = [
                torch.rand(
                    (3, size, size),
                    generator=torch.Generator().manual_seed(derive_seed(sample_id, view)),
                )
                for sample_id in sample_ids
            ]
            return torch.stack(rows) * 2 - 1

        def small_ints(view: str, what: str, limit: int) -> torch.Tensor:
            rows = [
                [derive_seed(sample_id, view, what, axis) % limit for axis in "hw"]
                for sample_id in sample_ids
            ]
            return torch.tensor(rows)

        views = ("chosen", "rejected")
        return ImageBatch(
            sample_ids=sample_ids,
            prompts=tuple(f"a {sample_id}" for sample_id in sample_ids),
            captions=tuple(f"a {sample_id}" for sample_id in sample_ids),
            images={view: images(view) for view in views},
            original_sizes={view: 512 + small_ints(view, "size", 512) for view in views},
            crop_corners={view: small_ints(view, "crop", 8) for view in views},
            timesteps=torch.tensor(
                [derive_seed(sample_id, "t") % 10_000 / 10 for sample_id in sample_ids],
                dtype=torch.float64,
            ),
            noise_seeds=tuple(derive_seed(sample_id, "noise") for sample_id in sample_ids),
            encoding_seeds={
                view: tuple(derive_seed(sample_id, view, "vae") for sample_id in sample_ids)
                for view in views
            },
        )

    return make
