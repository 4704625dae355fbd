import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import pixel_values
from diffalign.models.preference.time_conditioned_clip import TimeConditionedCLIP
from diffalign.scorers.step_aware import StepAware, tower_pixels
from tests.tiny_clip import IMAGE_SIZE, build_clip, write_clip

PROMPTS = ["a cat", "a dog", "a cat"]


def trained_network(**vision):
    network = TimeConditionedCLIP(build_clip(**vision)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if "adaLN" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a training run exports."""
    folder = write_clip(tmp_path_factory.mktemp("spm"))
    save_file(trained_network().state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return StepAware(path=str(folder))


def samples(count=3, size=(40, 40)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(4)) * 2 - 1


def times(*values):
    return torch.tensor(values)


def test_scores_are_those_of_the_network_at_each_time(scorer):
    images, t = samples(), times(0, 501, 951)
    scores = scorer.score(images, PROMPTS, t)
    network = trained_network()
    tokens = scorer._tokenizer(
        PROMPTS, padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = network(tower_pixels(images, IMAGE_SIZE), t, tokens, torch.arange(3))
    torch.testing.assert_close(scores, expected)
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_the_time_matters(scorer):
    image, prompt = samples(1), PROMPTS[:1]
    early, late = (scorer.score(image, prompt, times(t)) for t in (1, 951))
    assert (early - late).abs() > 1e-3


def test_a_row_does_not_depend_on_its_company(scorer, folder):
    images, t = samples(), times(1, 501, 951)
    together = scorer.score(images, PROMPTS, t)
    backwards = scorer.score(images.flip(0), PROMPTS[::-1], t.flip(0)).flip(0)
    one_by_one = StepAware(path=str(folder), images_per_batch=1).score(images, PROMPTS, t)
    torch.testing.assert_close(backwards, together)
    torch.testing.assert_close(one_by_one, together)


def test_it_says_that_it_takes_time(scorer):
    assert scorer.takes_time


def test_a_missing_time_is_refused(scorer):
    with pytest.raises(ValueError, match="needs t, the timestep of each image"):
        scorer.score(samples(), PROMPTS)


def test_counts_that_differ_are_refused(scorer):
    with pytest.raises(ValueError, match="3 images, 3 prompts and 2 timesteps: one each"):
        scorer.score(samples(), PROMPTS, times(1, 2))


class TestPreprocessing:
    def test_values_are_clamped_after_the_resize(self):
        images = 3 * torch.randn(1, 3, 64, 64)
        late = interpolate(images, size=(32, 32), mode="bicubic", align_corners=False).clamp(-1, 1)
        early = interpolate(images.clamp(-1, 1), size=(32, 32), mode="bicubic")
        torch.testing.assert_close(tower_pixels(images, 32), pixel_values(late))
        assert (tower_pixels(images, 32) - pixel_values(early.clamp(-1, 1))).abs().max() > 0.1

    def test_the_resize_does_not_smooth(self):
        checks = torch.ones(1, 3, 64, 64)
        checks[..., ::2, :] = -1
        smooth = interpolate(checks, size=(32, 32), mode="bicubic", antialias=True)
        assert (tower_pixels(checks, 32) - pixel_values(smooth)).abs().max() > 0.05

    def test_the_middle_of_a_wide_image_is_taken(self):
        wide = torch.full((1, 3, 32, 64), -1.0)
        wide[..., 16:48] = 1.0
        torch.testing.assert_close(tower_pixels(wide, 32), pixel_values(torch.ones(1, 3, 32, 32)))

    def test_a_image_of_the_right_size_is_only_normalised(self):
        images = samples(2, (32, 32))
        torch.testing.assert_close(tower_pixels(images, 32), pixel_values(images))


class TestCheckpoints:
    def test_a_checkpoint_of_the_authors_needs_a_clip(self, folder, tmp_path):
        file = tmp_path / "spm.safetensors"
        file.write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ModelError, match=r"set clip .*yuvalkirstain/PickScore_v1"):
            StepAware(path=str(file)).score(samples(), PROMPTS, times(1, 1, 1))

    @pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
    def test_it_scores_as_the_folder_does(self, folder, scorer, tmp_path, suffix):
        clip, file = write_clip(tmp_path / "clip", seed=9), tmp_path / f"spm{suffix}"
        state = load_file(folder / "model.safetensors")
        save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
        bare = StepAware(path=str(file), clip=str(clip), allow_pickle=suffix == ".bin")
        images, t = samples(), times(1, 501, 951)
        torch.testing.assert_close(
            bare.score(images, PROMPTS, t), scorer.score(images, PROMPTS, t), atol=0, rtol=0
        )

    def test_a_pickle_is_refused_unless_allowed(self, tmp_path):
        file = tmp_path / "spm.bin"
        torch.save({}, file)
        with pytest.raises(ModelError, match="set allow_pickle"):
            StepAware(path=str(file), clip=str(tmp_path)).score(samples(), PROMPTS, times(1, 1, 1))

    def test_names_without_the_wrapper_are_read(self, folder, scorer, tmp_path):
        state = load_file(folder / "model.safetensors")
        write_clip(tmp_path)
        bare = {name.removeprefix("model."): value for name, value in state.items()}
        save_file(bare, tmp_path / "model.safetensors")
        images, t = samples(), times(1, 501, 951)
        other = StepAware(path=str(tmp_path)).score(images, PROMPTS, t)
        assert torch.equal(other, scorer.score(images, PROMPTS, t))

    def test_another_width_is_refused_with_names_and_shapes(self, folder, tmp_path):
        wide = write_clip(tmp_path, hidden_size=48)
        crossed = StepAware(path=str(folder / "model.safetensors"), clip=str(wide))
        with pytest.raises(
            ModelError,
            match=r"another size than this network: model\.\S+ \(24,\) there and \(48,\) here",
        ):
            crossed.score(samples(), PROMPTS, times(1, 1, 1))

    def test_a_plain_clip_is_refused_by_the_names_that_it_lacks(self, tmp_path):
        plain = StepAware(path=str(write_clip(tmp_path)))
        with pytest.raises(ModelError, match=r"lacks weights .*t_embedder\.mlp.*more"):
            plain.score(samples(), PROMPTS, times(1, 1, 1))

    def test_the_tokenizer_may_lie_elsewhere(self, folder, scorer, tmp_path):
        moved = tmp_path / "spm"
        moved.mkdir()
        for name in ("config.json", "model.safetensors"):
            (moved / name).write_bytes((folder / name).read_bytes())
        images, t = samples(), times(1, 501, 951)
        apart = StepAware(path=str(moved), tokenizer=str(folder)).score(images, PROMPTS, t)
        assert torch.equal(apart, scorer.score(images, PROMPTS, t))

    def test_equal_weights_have_one_fingerprint_and_others_another(self, folder, scorer, tmp_path):
        copy = tmp_path / "model.safetensors"
        copy.write_bytes((folder / "model.safetensors").read_bytes())
        assert StepAware(path=str(copy)).fingerprint == scorer.fingerprint
        copy.write_bytes(copy.read_bytes()[:-1] + b"x")
        assert StepAware(path=str(copy)).fingerprint != scorer.fingerprint


def test_settings_are_checked_without_weights():
    with pytest.raises(ValueError, match="images_per_batch must be at least 1, got 0"):
        StepAware(path="nowhere", images_per_batch=0)
