"""A loaded diffusion model: encoding, prediction, reference and export."""

from __future__ import annotations

import dataclasses
import hashlib
from unittest.mock import patch

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from diffalign.likelihoods.denoising import Denoising
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.models.diffusion.kohya import KOHYA_FILE
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.diffusion.sdxl import SDXL
from diffalign.models.lora import LoraSettings

CPU = torch.device("cpu")
PIPELINES = {SD15: StableDiffusionPipeline, SDXL: StableDiffusionXLPipeline}
TRAININGS = [
    pytest.param(LoraSettings(rank=2, alpha=1), "adapter_off", id="lora"),
    pytest.param(LoraSettings(rank=2, dora=True), "adapter_off", id="dora"),
    pytest.param(LoraSettings(rank=2, rslora=True), "frozen_copy", id="lora_and_copy"),
    pytest.param(None, "frozen_copy", id="full"),
]


@pytest.fixture(params=["sd15", "sdxl_v"])
def make_model(request):
    """Loads a backbone, with either prediction type among them."""
    folder = request.getfixturevalue(f"tiny_{request.param}")
    settings = SDXL if "sdxl" in request.param else SD15

    def make(lora=None, *, reference="none", dtype=torch.float32, **changes):
        model = settings(path=str(folder), lora=lora, **changes)
        return model.load(device=CPU, compute_dtype=dtype, reference=reference)

    make.pipeline = lambda path=folder: PIPELINES[settings].from_pretrained(path)
    return make


@pytest.fixture
def model(tiny_sdxl):
    settings = SDXL(path=str(tiny_sdxl), images_per_encoding=2)
    return settings.load(device=CPU, compute_dtype=torch.float32, reference="none")


def take_two_steps(model, batch):
    """Two DPO-like steps, large enough to be seen."""
    parameters = [parameter for _, parameter in model.trained_parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    likelihood = Denoising()
    for _ in range(2):
        rows = likelihood.evaluate(model, likelihood.prepare(model, batch))
        (rows["rejected"] - rows["chosen"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sample(pipeline):
    return pipeline(
        "a red circle",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def reference_weights(model):
    trained = {name for name, _ in model.trained_parameters()}
    frozen = getattr(model._reference, "network", None)
    weights = (
        frozen.state_dict()
        if frozen is not None
        else {k: v for k, v in model.network.state_dict().items() if k not in trained}
    )
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


# --- encoding -----------------------------------------------------------------------------------


def test_a_rows_latents_do_not_depend_on_its_batch(model, make_pairs):
    images = make_pairs("a", "b", "c").images["chosen"]

    together = model.autoencoder.encode(images, [1, 2, 3])
    alone = model.autoencoder.encode(images[2:], [3])

    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-6)


def test_equal_prompts_are_encoded_once(model):
    with patch.object(type(model.prompts.conditioner), "encode", autospec=True) as encode:
        encode.side_effect = lambda _, prompts: embeddings[len(prompts)]
        embeddings = {2: _embeddings(2)}
        encoded = model.prompts.encode(["a", "", "a", ""])

    encode.assert_called_once_with(model.prompts.conditioner, ["a", ""])
    assert encoded.hidden_states[:, 0, 0].tolist() == [0, 1, 0, 1]


def _embeddings(n):
    from diffalign.models.diffusion.conditioning import PromptEmbeddings

    rows = torch.arange(n, dtype=torch.float32)
    return PromptEmbeddings(hidden_states=rows.reshape(n, 1, 1), pooled=rows.reshape(n, 1))


def test_encoders_are_not_autocast(model, make_pairs):
    batch = make_pairs("a")
    plain = model.autoencoder.encode(batch.images["chosen"], [1])
    embeddings = model.prompts.encode(["a"])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.autoencoder.encode(batch.images["chosen"], [1]), plain)
        assert torch.equal(model.prompts.encode(["a"]).hidden_states, embeddings.hidden_states)


# --- policy and reference -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_before_the_first_step_policy_and_reference_are_equal_bit_for_bit(
    make_model, make_pairs, lora, reference, dtype
):
    model = make_model(lora, reference=reference, dtype=dtype)
    likelihood = Denoising()
    prepared = likelihood.prepare(model, make_pairs("a", "b", "c"))

    with torch.no_grad(), model.reference():
        reference_rows = likelihood.evaluate(model, prepared)
    policy_rows = likelihood.evaluate(model, prepared)

    for view in ("chosen", "rejected"):
        assert torch.equal(policy_rows[view], reference_rows[view])
        assert policy_rows[view].requires_grad
        assert not reference_rows[view].requires_grad


@pytest.mark.parametrize("make_model", ["sd15", "sd15_v", "sdxl", "sdxl_v"], indirect=True)
@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_training_moves_the_policy_and_leaves_the_reference(
    make_model, make_pairs, lora, reference
):
    model = make_model(lora, reference=reference)
    batch = make_pairs("a", "b")
    likelihood = Denoising()
    prepared = likelihood.prepare(model, batch)
    policy_before = likelihood.evaluate(model, prepared)["chosen"]
    with torch.no_grad(), model.reference():
        reference_before = likelihood.evaluate(model, prepared)["chosen"]
    weights_before = reference_weights(model)

    take_two_steps(model, batch)

    with torch.no_grad(), model.reference():
        assert torch.equal(likelihood.evaluate(model, prepared)["chosen"], reference_before)
    assert reference_weights(model) == weights_before
    assert not torch.equal(likelihood.evaluate(model, prepared)["chosen"], policy_before)


def test_the_policy_is_back_after_an_error_in_the_reference(tiny_sdxl, make_pairs):
    settings = SDXL(path=str(tiny_sdxl), lora=LoraSettings(rank=2))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="adapter_off")
    batch = make_pairs("a")
    take_two_steps(model, batch)
    prepared = Denoising().prepare(model, batch)
    before = Denoising().evaluate(model, prepared)["chosen"]
    names = [name for name, p in model.network.named_parameters() if p.requires_grad]

    with pytest.raises(KeyError), model.reference():
        raise KeyError

    assert torch.equal(Denoising().evaluate(model, prepared)["chosen"], before)
    assert [name for name, p in model.network.named_parameters() if p.requires_grad] == names


def test_a_model_without_a_reference_says_so(model):
    with pytest.raises(ValueError, match="loaded with reference 'none'"), model.reference():
        pass


def test_dropout_of_the_base_is_off_in_every_mode(tiny_sd15, make_pairs):
    settings = SD15(path=str(tiny_sd15))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="none")
    prepared = Denoising().prepare(model, make_pairs("a"))

    model.network.train()
    rows = [Denoising().evaluate(model, prepared)["chosen"] for _ in range(2)]

    assert model.network.config.dropout > 0
    assert torch.equal(*rows)


def test_dropout_of_the_adapter_stays_on_while_training(tiny_sd15, make_pairs):
    settings = SD15(path=str(tiny_sd15), lora=LoraSettings(rank=2, dropout=0.5))
    model = settings.load(device=CPU, compute_dtype=torch.float32, reference="adapter_off")
    batch = make_pairs("a")
    take_two_steps(model, batch)
    prepared = Denoising().prepare(model, batch)

    rows = [Denoising().evaluate(model, prepared)["chosen"] for _ in range(2)]

    assert not torch.equal(*rows)


def test_the_module_that_is_called_is_the_one_that_was_stored(model, make_pairs):
    prepared = Denoising().prepare(model, make_pairs("a"))

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model.network = Wrapper(model.network)
    Denoising().evaluate(model, prepared)

    assert model.network.calls == 1
    assert not any(name.startswith("module.") for name, _ in model.trained_parameters())


# --- gradient checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(make_model, make_pairs, lora):
    results = []
    for checkpointing in (False, True):
        model = make_model(lora, gradient_checkpointing=checkpointing)
        rows = Denoising().evaluate(model, Denoising().prepare(model, make_pairs("a", "b")))
        loss = (rows["chosen"] - rows["rejected"]).sum()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.trained_parameters()}))
    (loss, gradients), (loss_again, gradients_again) = results

    assert model.network.is_gradient_checkpointing
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    assert any(gradient.norm() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-7)


# --- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [
        LoraSettings(rank=2, alpha=8),
        LoraSettings(rank=2, dora=True),
        LoraSettings(rank=2, rslora=True, targets=("to_q", "conv1", "proj_in")),
    ],
    ids=["lora", "dora", "rslora_with_convolutions"],
)
def test_an_exported_adapter_changes_the_image_as_it_changed_the_policy(
    make_model, make_pairs, tmp_path, lora
):
    model = make_model(lora)
    take_two_steps(model, make_pairs("a", "b"))
    prepared = Denoising().prepare(model, make_pairs("a"))
    expected = model.predict(prepared.noisy, prepared.time, prepared.conditioning)
    pipeline = make_model.pipeline()
    before = sample(pipeline)

    model.export(tmp_path / "final")
    pipeline.load_lora_weights(tmp_path / "final", weight_name=ADAPTER_FILE)

    assert {f.name for f in (tmp_path / "final").iterdir()} == {ADAPTER_FILE, KOHYA_FILE}
    assert not torch.equal(sample(pipeline), before)
    loaded = pipeline.unet(
        prepared.noisy, prepared.time, return_dict=False, **prepared.conditioning
    )[0]
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)


def test_an_exported_model_opens_as_a_pipeline_and_changes_the_image(
    make_model, make_pairs, tmp_path
):
    model = make_model(dtype=torch.bfloat16)
    take_two_steps(model, make_pairs("a", "b"))

    model.export(tmp_path / "final")
    pipeline = make_model.pipeline(tmp_path / "final")
    base = make_model.pipeline()

    assert not list((tmp_path / "final").rglob("*.bin"))
    assert not torch.equal(sample(pipeline), sample(base))
    for name, value in model.trained_parameters():
        assert torch.equal(pipeline.unet.get_parameter(name), value)
    frozen = base.text_encoder.state_dict()  # not rounded to the precision of the run
    assert all(torch.equal(v, frozen[k]) for k, v in pipeline.text_encoder.state_dict().items())
    assert pipeline.scheduler.config.prediction_type == base.scheduler.config.prediction_type


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_given_values_are_exported_and_the_live_ones_stay(make_model, tmp_path, lora):
    model = make_model(lora)
    live = {name: p.detach().clone() for name, p in model.trained_parameters()}
    average = {name: torch.full_like(p, 0.5) for name, p in live.items()}

    model.export(tmp_path / "final", average)

    file = next((tmp_path / "final").rglob("*unet*/*.safetensors"), None)
    file = file or tmp_path / "final" / "pytorch_lora_weights.safetensors"
    assert {v.unique().item() for v in load_file(file).values()} == {0.5}
    assert all(torch.equal(p, live[name]) for name, p in model.trained_parameters())


def test_values_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"must name every trained parameter.*add_embedding"):
        model.export(tmp_path / "final", {"conv_in.weight": torch.zeros(1)})


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lora", "reference"), TRAININGS)
def test_on_cuda_policy_and_reference_start_equal_and_never_wait_for_the_device(
    tiny_sdxl, make_pairs, lora, reference, dtype
):
    settings = SDXL(path=str(tiny_sdxl), lora=lora)
    cuda = torch.device("cuda")
    model = settings.load(device=cuda, compute_dtype=dtype, reference=reference)
    likelihood, batch = Denoising(), make_pairs("a", "b")
    likelihood.evaluate(model, likelihood.prepare(model, batch))  # warm up

    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared = likelihood.prepare(model, batch)
        with torch.no_grad(), model.reference():
            reference_rows = likelihood.evaluate(model, prepared)
        policy_rows = likelihood.evaluate(model, prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for view in ("chosen", "rejected"):
        assert torch.equal(policy_rows[view], reference_rows[view])


def test_views_with_prompts_of_their_own_are_told_them(make_model, make_pairs):
    model, batch = make_model(), make_pairs("a", "b")
    own = {"chosen": ("good a", "good b"), "rejected": ("bad a", "bad b")}
    found = model.conditioning(dataclasses.replace(batch, own_prompts=own))
    for start, prompts in ((0, own["chosen"]), (2, own["rejected"])):
        shared = model.conditioning(dataclasses.replace(batch, prompts=prompts))
        for name, rows in flat_tensors(found).items():
            expected = flat_tensors(shared)[name]
            torch.testing.assert_close(rows[start : start + 2], expected[start : start + 2])
    assert not torch.equal(
        *(
            flat_tensors(each)["encoder_hidden_states"]
            for each in (found, model.conditioning(batch))
        )
    )


def flat_tensors(conditioning):
    """The tensors that a network is told, whatever they are nested in."""
    found = {}
    for name, value in conditioning.items():
        found |= flat_tensors(value) if isinstance(value, dict) else {name: value}
    return found
