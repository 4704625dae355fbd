import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from diffalign.errors import ModelError
from diffalign.models.preference.clip_loading import (
    blank_clip,
    cosine,
    fill,
    find_weights,
    image_features,
    pixel_values,
    read_clip,
    read_state,
    read_tokenizer,
    text_features,
    tokenize,
)
from tests.tiny_clip import IMAGE_SIZE, build_clip, write_clip
from tests.tiny_models import TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_half_precision_files_are_read_in_float32(tmp_path):
    build_clip().half().save_pretrained(tmp_path)
    clip = read_clip(str(tmp_path))
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    assert not clip.training


def test_a_blank_clip_is_of_float32_though_its_folder_is_not(tmp_path):
    build_clip().half().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in blank_clip(str(tmp_path)).parameters()} == {torch.float32}


def test_features_are_those_that_transformers_compares(folder):
    clip = read_clip(str(folder))
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = tokenize(read_tokenizer(str(folder)), ["a cat", "a much longer dog"], length=TOKENS)
    with torch.no_grad():
        output = clip(input_ids=tokens, pixel_values=pixels)
        images, texts = image_features(clip, pixels), text_features(clip, tokens)
    torch.testing.assert_close(cosine(images, output.image_embeds), torch.ones(2))
    torch.testing.assert_close(cosine(texts, output.text_embeds), torch.ones(2))


def test_prompts_are_cut_and_padded_to_the_tower(folder):
    tokens = tokenize(read_tokenizer(str(folder)), ["a", "b" * 50], length=TOKENS)
    assert tokens.shape == (2, TOKENS)
    assert tokens[1, -1] == 137, "the end of the text is kept where the text is cut"


def test_pixel_values_are_those_of_the_published_processor():
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
    expected = processor(images=[((images[0] + 1) / 2).numpy()], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values(images), expected)


def test_the_cosine_ignores_lengths_and_is_float32():
    first = torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    second = torch.tensor([[0.5, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)
    result = cosine(first, second)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx([1.0, 0.5**0.5])


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(ModelError, match="clip: cannot read a CLIP from"):
        read_clip(str(tmp_path))
    with pytest.raises(ModelError, match="tokenizer: cannot read a CLIP tokenizer"):
        read_tokenizer(str(tmp_path), field="tokenizer")


def test_a_clip_that_lacks_weights_is_refused_by_their_names(folder, tmp_path):
    build_clip().config.save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of a CLIP: visual_projection\.weight"):
        read_clip(str(tmp_path))


def test_a_blank_clip_disturbs_no_random_number(folder):
    before = torch.get_rng_state()
    clip = blank_clip(str(folder))
    assert clip.config.projection_dim == 12
    assert torch.equal(torch.get_rng_state(), before)


class TestFill:
    def test_weights_arrive(self):
        clip, other = build_clip(seed=0), build_clip(seed=1)
        fill(clip, other.state_dict(), source="other")
        assert torch.equal(clip.visual_projection.weight, other.visual_projection.weight)

    def test_position_ids_of_old_files_are_tolerated(self):
        clip = build_clip()
        old = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        fill(clip, {**clip.state_dict(), **old}, source="old")

    def test_missing_weights_are_named_and_counted(self):
        clip = build_clip()
        state = {n: v for n, v in clip.state_dict().items() if "self_attn" not in n}
        with pytest.raises(ModelError, match=r"here\.bin lacks .*k_proj\.bias, .*and 29 more"):
            fill(clip, state, source="here.bin")

    def test_unknown_weights_are_named(self):
        clip = build_clip()
        state = {**clip.state_dict(), "head.weight": torch.zeros(1)}
        with pytest.raises(ModelError, match=r"has not: head\.weight"):
            fill(clip, state, source="here")

    def test_another_width_is_refused_with_both_shapes(self):
        wider = build_clip(hidden_size=48)
        with pytest.raises(ModelError, match=r"another size.*\(48,\) there and \(24,\) here"):
            fill(build_clip(), wider.state_dict(), source="wider")


class TestFiles:
    def test_a_folder_means_its_weights(self, folder):
        found = find_weights(str(folder), revision=None, allow_pickle=False)
        assert found == folder / "model.safetensors"

    def test_a_folder_without_weights_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
            find_weights(str(tmp_path), revision=None, allow_pickle=False)

    def test_what_exists_nowhere_is_refused(self):
        with pytest.raises(ModelError, match=r"no file or folder \./gone, and it is no hub id"):
            find_weights("./gone", revision=None, allow_pickle=False)

    def test_a_pickle_is_read_only_where_it_is_allowed_and_only_as_tensors(self, tmp_path):
        file = tmp_path / "weights.bin"
        torch.save({"a": torch.ones(2)}, file)
        with pytest.raises(ModelError, match=r"(?s)weights\.bin.*Or set allow_pickle"):
            find_weights(str(file), revision=None, allow_pickle=False)
        assert find_weights(str(file), revision=None, allow_pickle=True) == file
        assert read_state(file)["a"].tolist() == [1, 1]

    def test_a_pickle_that_would_run_code_is_refused(self, tmp_path):
        file = tmp_path / "evil.bin"
        file.write_bytes(pickle.dumps(print))
        with pytest.raises(ModelError, match="cannot be read as weights"):
            read_state(file)

    def test_something_other_than_tensors_by_name_is_refused(self, tmp_path):
        file = tmp_path / "list.bin"
        torch.save({"state": {"a": torch.ones(2)}}, file)
        with pytest.raises(ModelError, match="other than tensors by name"):
            read_state(file)

    def test_a_damaged_file_is_refused(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"not weights")
        with pytest.raises(ModelError, match="cannot be read as weights"):
            read_state(file)
