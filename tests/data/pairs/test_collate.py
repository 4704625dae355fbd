import torch

from diffalign.data.pairs.samples import Sample, stack, with_unit_range
from diffalign.data.pairs.transforms import CutImage


def sample(name, value):
    pixels = torch.full((3, 8, 16), value, dtype=torch.uint8)
    image = CutImage(pixels=pixels, original_size=(20, 30), corner=(1, 2))
    return Sample(
        sample_id=name,
        prompt="",
        caption=f"caption of {name}",
        images={"chosen": image, "rejected": image},
        timestep=12.5,
        noise_seed=value,
        encoding_seeds={"chosen": value + 1, "rejected": value + 2},
        preference=1.0,
        importance=1.0,
    )


def test_fields_stack_in_the_order_of_the_samples():
    batch = stack([sample("a", 0), sample("b", 255)])
    assert batch.images["chosen"].dtype == torch.uint8
    assert batch.sample_ids == ("a", "b")
    assert batch.prompts == ("", "")
    assert batch.captions == ("caption of a", "caption of b")
    assert batch.noise_seeds == (0, 255)
    assert batch.encoding_seeds == {"chosen": (1, 256), "rejected": (2, 257)}
    assert batch.timesteps.tolist() == [12.5, 12.5]
    assert batch.timesteps.dtype == torch.float64
    assert batch.original_sizes["rejected"].tolist() == [[20, 30]] * 2
    assert batch.crop_corners["rejected"].tolist() == [[1, 2]] * 2
    assert batch.crop_corners["rejected"].dtype == torch.int64


def test_images_run_from_minus_one_to_one():
    images = with_unit_range(stack([sample("a", 0), sample("b", 255)])).images["chosen"]
    assert images.shape == (2, 3, 8, 16)
    assert images.dtype == torch.float32
    assert images[0].unique().tolist() == [-1.0]
    assert images[1].unique().tolist() == [1.0]
