"""`diffalign export`: what was written, opened again by the libraries that read it, and the images
that it makes."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffalign import config
from diffalign.cli import app
from diffalign.errors import CheckpointError, ConfigError, DataError, ModelError
from diffalign.generation.manifest import ManifestRow, append_rows
from diffalign.generation.models import ModelSpec, locate_model
from diffalign.jobs import export, train
from diffalign.jobs.export import ExportConfig
from diffalign.models.diffusion.kohya import KOHYA_FILE
from diffalign.models.diffusion.parts import PipelineParts
from diffalign.training.config import RunConfig
from tests import layouts, original_names
from tests.original_names import OLD_READER
from tests.tiny_models import write_sd15, write_sdxl
from tests.training.test_card import comparison

SMOKE = Path(__file__).parents[2] / "configs/smoke/diffusion_dpo_sdxl.yaml"
ALL = (
    "targets: [to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, "
    "conv2, conv_shortcut, time_emb_proj, conv, conv_in, conv_out, linear_1, linear_2]"
)
ADAPTERS = {
    "alpha": "{rank: 4, alpha: 6}",
    "rslora": "{rank: 4, alpha: 6, rslora: true}",
    "dora": "{rank: 4, alpha: 6, dora: true}",
    "all": f"{{rank: 2, alpha: 3, {ALL}}}",
    "all_dora": f"{{rank: 2, alpha: 3, dora: true, {ALL}}}",
    "weights": "null",
}
KNOWN = {"sd15": original_names.TINY_SD15, "sdxl": original_names.TINY_SDXL}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd15": write_sd15(folder / "sd15"),
        "sd2": write_sd15(folder / "sd2", prediction_type="v_prediction", hidden_act="gelu"),
        "sdxl": write_sdxl(folder / "sdxl", second_width=16),
        "sdxl_v": write_sdxl(folder / "sdxl_v", second_width=16, prediction_type="v_prediction"),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models):
    """Trains a model once: two steps, far enough to be seen."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    layouts.write_pickapic(data, layouts.make_pairs(4))
    made: dict[tuple[str, str], Path] = {}

    def run(name: str, adapter: str) -> Path:
        output = folder / f"{name} {adapter}"
        if (name, adapter) not in made:
            train.run(
                config.load(
                    RunConfig,
                    SMOKE,
                    [
                        f"model.path={models[name]}",
                        f"model.kind={'sdxl' if 'xl' in name else 'sd15'}",
                        f"model.lora={ADAPTERS[adapter]}",
                        f"data.path={data}",
                        "data.resolution=32",
                        f"output={output}",
                        "optimizer.lr=0.1",
                        "training.checkpoint_every=1",
                    ],
                )
            )
            made[name, adapter] = output
        return output

    return run


def pipeline_class(name):
    return getattr(
        diffusers, "StableDiffusionXLPipeline" if "xl" in name else "StableDiffusionPipeline"
    )


def opened(name, path, **options):
    parts = {} if "xl" in name else {"safety_checker": None}
    return pipeline_class(name).from_pretrained(path, **parts, **options)


def image(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red thing",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images[0]


@functools.cache
def trained_image(name, base, run):
    """Of what the run wrote for diffusers."""
    if (run / "final/model_index.json").is_file():
        return image(opened(name, run / "final"))
    pipeline = opened(name, base)
    before = image(pipeline)
    pipeline.load_lora_weights(run / "final", weight_name="pytorch_lora_weights.safetensors")
    after = image(pipeline)
    assert (before - after).abs().max() > 5 / 255, "nothing to see"
    return after


def same(first, second) -> bool:
    return bool((first - second).abs().max() <= 1 / 255)


def exported(run, **changes) -> Path:
    return export.run(ExportConfig(run=run, **changes))


def under_comfyui(name, models, file):
    """The base with a LoRA as ComfyUI's rules apply it; every key of the file is used."""
    pipeline = opened(name, models[name])
    tensors, key_map = load_file(file), original_names.comfyui_key_map(KNOWN[name])
    originals = {original: ours for ours, original in KNOWN[name].items()}
    layers = {key.partition(".")[0] for key in tensors}
    assert layers <= key_map.keys()
    for layer in layers:
        module = pipeline.unet.get_submodule(originals[key_map[layer]])
        module.weight.data = original_names.comfyui_weight(module.weight.data, tensors, layer)
    return image(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("sd15", "alpha"),
        ("sd15", "rslora"),
        ("sd15", "all"),
        ("sd15", "all_dora"),
        ("sdxl", "dora"),
        ("sdxl", "all"),
        ("sdxl", "alpha"),
    ],
)
def test_a_lora_makes_the_same_image_in_diffusers_and_by_comfyuis_rules(
    name, adapter, models, runs, tmp_path
):
    run = runs(name, adapter)
    expected = trained_image(name, models[name], run)
    files = [run / "final" / KOHYA_FILE, exported(run, output=tmp_path / "x.safetensors")]
    for file in files:
        assert same(under_comfyui(name, models, file), expected)
        if adapter == "all" and OLD_READER:
            continue
        if "dora" not in adapter:  # whose magnitudes diffusers drops, with a warning
            pipeline = opened(name, models[name])
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
            assert same(image(pipeline), expected)
    folder = exported(run, form="diffusers", output=tmp_path / "folder")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        KOHYA_FILE,
        "pytorch_lora_weights.safetensors",
    ]
    pipeline = opened(name, models[name])
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    assert same(image(pipeline), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("sd15", "all_dora"),
        ("sd15", "weights"),
        ("sd2", "alpha"),
        ("sdxl", "alpha"),
        ("sdxl_v", "weights"),
    ],
)
def test_a_merged_model_makes_the_same_image_as_folder_and_as_single_file(
    name, adapter, models, runs, tmp_path
):
    run = runs(name, adapter)
    expected = trained_image(name, models[name], run)
    folder = exported(run, form="folder", output=tmp_path / "folder")
    assert same(image(opened(name, folder)), expected)
    file = exported(run, form="single_file", output=tmp_path / "x.safetensors")
    single = pipeline_class(name).from_single_file(str(file), config=str(models[name]))
    assert same(image(single), expected)
    markers = {"v_pred", "ztsnr"} & load_file(file).keys()
    assert markers == ({"v_pred", "ztsnr"} if name == "sdxl_v" else set())


@pytest.mark.parametrize("adapter", ["alpha", "weights"])
def test_in_half_precision_nothing_but_what_is_merged_into_is_read_in_float32(
    adapter, models, runs, tmp_path, monkeypatch
):
    run, asked = runs("sd15", adapter), []
    read = PipelineParts.read

    def noted(self, network=None, **dtypes):
        kept = torch.float32 if network is None else next(network.parameters()).dtype
        asked.append((kept, dtypes["text_dtype"], dtypes["vae_dtype"]))
        return read(self, network, **dtypes)

    monkeypatch.setattr(PipelineParts, "read", noted)
    folder = exported(run, form="folder", output=tmp_path / "folder", dtype="fp16")
    network = torch.float32 if adapter == "alpha" else torch.float16
    assert asked == [(network, torch.float16, torch.float16)]
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 3
    assert {value.dtype for file in files for value in load_file(file).values()} <= {
        torch.float16,
        torch.int64,  # positions, in some versions of transformers
    }
    monkeypatch.undo()
    expected = trained_image("sd15", models["sd15"], run)
    found = image(opened("sd15", folder, torch_dtype=torch.float32))
    assert (found - expected).abs().max() < 0.05


def test_numbers_that_a_precision_cannot_hold_are_refused_by_their_name(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs("sd15", "weights"), run)
    file = run / "final/text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "q_proj.weight" in name)
    tensors[name][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    message = r"text_encoder\..*q_proj.weight holds inf, which torch.float16 cannot: set dtype"
    with pytest.raises(ModelError, match=message):
        exported(run, form="folder", output=tmp_path / "folder", dtype="fp16")
    assert not (tmp_path / "folder").exists()
    exported(run, form="folder", output=tmp_path / "folder", dtype="bf16")


@pytest.mark.parametrize("adapter", ["alpha", "weights"])
def test_a_checkpoint_is_exported_as_the_run_would_have_ended_there(
    adapter, models, runs, tmp_path
):
    run = runs("sd15", adapter)
    images = {}
    for step in (1, 2):
        file = tmp_path / f"{step}.safetensors"
        exported(run / f"checkpoint-{step}", form="single_file", output=file)
        pipeline = diffusers.StableDiffusionPipeline.from_single_file(
            str(file), config=str(models["sd15"])
        )
        images[step] = image(pipeline)
    assert same(images[2], trained_image("sd15", models["sd15"], run))
    assert not same(images[1], images[2])


def test_a_checkpoint_of_a_lora_is_a_lora(models, runs, tmp_path):
    run = runs("sdxl", "alpha")
    file = exported(run / "checkpoint-2")
    assert file == run / "export" / "sdxl alpha-2_lora.safetensors"
    ours, final = load_file(file), load_file(run / "final" / KOHYA_FILE)
    assert ours.keys() == final.keys()
    assert all(torch.equal(ours[name], final[name]) for name in ours)
    with pytest.raises(ConfigError, match="exists: choose another place with output="):
        exported(run / "checkpoint-2")


def test_alpha_and_the_header_say_what_was_trained(models, runs, tmp_path):
    file = exported(runs("sdxl", "alpha"), output=tmp_path / "x.safetensors")
    tensors = load_file(file)
    assert {value.item() for name, value in tensors.items() if name.endswith(".alpha")} == {6.0}
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_network_dim"] == "4"
    assert header["ss_network_alpha"] == "6"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["ss_sd_model_name"] == "sdxl"
    assert header["ss_output_name"] == header["modelspec.title"] == "sdxl alpha"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.resolution"] == "32x32"
    assert str(models["sdxl"].parent) not in json.dumps(header)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "folder", "single_file"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_chosen_dtype_is_that_of_every_weight(form, dtype, runs, tmp_path):
    output = tmp_path / ("x.safetensors" if form in ("kohya", "single_file") else "x")
    exported(runs("sd15", "alpha"), form=form, dtype=dtype, output=output)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for file in [output] if output.is_file() else output.rglob("*.safetensors"):
        tensors = {k: v for k, v in load_file(file).items() if not k.endswith(".alpha")}
        assert {value.dtype for value in tensors.values()} == {wanted}, file


def test_a_number_that_half_precision_cannot_hold_is_refused(runs, tmp_path):
    run = runs("sd15", "alpha")
    file = tmp_path / "large.safetensors"
    name = next(iter(load_file(run / "final/pytorch_lora_weights.safetensors")))
    down, up = (name.replace("lora_B", "lora_A"), name.replace("lora_A", "lora_B"))
    adapter = load_file(run / "final/pytorch_lora_weights.safetensors")
    adapter[up] = torch.full_like(adapter[up], 1e5)
    save_file({down: adapter[down], up: adapter[up]}, file)
    base = config.load(RunConfig, run / "config.yaml").model.path
    with pytest.raises(ModelError, match=r"holds 100000, which .*: set dtype to bf16 or float32"):
        exported(file, base=base, dtype="fp16", output=tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_ranks_and_alphas_that_differ_by_layer_are_honoured(models, tmp_path):
    """An adapter of somebody else, in diffusers' file with peft's settings in its header."""
    if OLD_READER:
        pytest.skip("this diffusers writes no settings into a header")
    base = opened("sd15", models["sd15"])
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    torch.manual_seed(0)
    state, ranks = {}, {f"{attention}.to_q": 2, f"{attention}.to_k": 4, f"{attention}.to_v": 4}
    for module, rank in ranks.items():
        width_out, width_in = base.unet.get_submodule(module).weight.shape
        state[f"{module}.lora_A.weight"] = torch.randn(rank, width_in)
        state[f"{module}.lora_B.weight"] = torch.randn(width_out, rank)
    settings = {"r": 4, "lora_alpha": 1, "rank_pattern": {"attn1.to_q": 2}}
    settings |= {"alpha_pattern": {"to_k": 8}, "use_rslora": False}
    base.save_lora_weights(
        tmp_path / "theirs", unet_lora_layers=state, unet_lora_adapter_metadata=settings
    )
    file = exported(tmp_path / "theirs", base=str(models["sd15"]))
    tensors = load_file(file)
    for module, scale in [("to_q", 1 / 2), ("to_k", 8 / 4), ("to_v", 1 / 4)]:
        name = f"lora_unet_{attention}.{module}".replace(".", "_")
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        change = tensors[f"{name}.alpha"].item() / down.shape[0] * up @ down
        theirs = [state[f"{attention}.{module}.lora_{factor}.weight"] for factor in "BA"]
        assert torch.allclose(change, scale * theirs[0] @ theirs[1])
    # And back: what was exported is itself an adapter that can be exported.
    folder = exported(file, form="diffusers", base=str(models["sd15"]), output=tmp_path / "back")
    back = load_file(folder / "pytorch_lora_weights.safetensors")
    name = f"unet.{attention}.to_k"
    assert torch.allclose(
        back[f"{name}.lora_B.weight"] @ back[f"{name}.lora_A.weight"],
        2 * state[f"{attention}.to_k.lora_B.weight"] @ state[f"{attention}.to_k.lora_A.weight"],
        atol=1e-5,
    )


def test_what_a_form_cannot_hold_is_refused_in_a_sentence(models, runs, tmp_path):
    lora, whole = runs("sd15", "alpha"), runs("sd15", "weights")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((lora / "config.yaml").read_text())
    (unfinished / "checkpoint-7").mkdir()
    (unfinished / "checkpoint-7/state.json").write_text("{}")
    (unfinished / "checkpoint-8").mkdir()
    for name in ("state.json", "weights.safetensors"):
        (unfinished / "checkpoint-8" / name).write_text("{}")
    adapter = lora / "final/pytorch_lora_weights.safetensors"
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(adapter.read_bytes())
    refused = {
        "trained all weights, which no low-rank adapter holds: use form=folder or": (
            {"run": whole, "form": "kohya"}
        ),
        "form is peft, which is for vision-language models": {"run": lora, "form": "peft"},
        "there is no such run, checkpoint or adapter": {"run": tmp_path / "gone"},
        "has not finished.* or export a checkpoint of it, for example .*checkpoint-8": (
            {"run": unfinished}
        ),
        "an adapter outside its run.* base=": {"run": outside},
        "base is for an adapter outside its run": {"run": lora, "base": str(models["sdxl"])},
        "checkpoint-7: the checkpoint is damaged": {"run": unfinished / "checkpoint-7"},
        "checkpoint-8: the checkpoint is damaged": {"run": unfinished / "checkpoint-8"},
        "form kohya is one file: its name must end in .safetensors": {"run": lora},
        "form folder is a folder": (
            {"run": lora, "form": "folder", "output": tmp_path / "x.safetensors"}
        ),
        "made for another model": ({"run": outside, "form": "folder", "base": str(models["sdxl"])}),
    }
    for message, settings in refused.items():
        with pytest.raises((ConfigError, ModelError, CheckpointError), match=message):
            export.run(ExportConfig(**{"output": tmp_path / "nothing", **settings}))
    assert not (tmp_path / "nothing").exists()


def test_text_encoders_of_an_adapter_go_into_a_merged_model_and_are_never_dropped(
    models, runs, tmp_path
):
    base = opened("sdxl", models["sdxl"])
    before = image(base)
    torch.manual_seed(0)
    state = {
        f"{encoder}.{prefix}encoder.layers.0.self_attn.q_proj.lora_{factor}.weight": torch.randn(
            *((2, width) if factor == "A" else (width, 2))
        )
        for encoder, prefix, width in [
            ("text_encoder", "text_model.", 8),
            ("text_encoder_2", "text_model.", 16),
        ]
        for factor in "AB"
    }
    unet = load_file(runs("sdxl", "alpha") / "final/pytorch_lora_weights.safetensors")
    save_file({**unet, **state}, tmp_path / "both.safetensors")
    with pytest.raises(ConfigError, match="changes text_encoder, text_encoder_2 as well"):
        exported(tmp_path / "both.safetensors", base=str(models["sdxl"]))
    folder = exported(tmp_path / "both.safetensors", form="folder", base=str(models["sdxl"]))
    merged = opened("sdxl", folder)
    assert not same(image(merged), before)
    for encoder in ("text_encoder", "text_encoder_2"):
        theirs, ours = getattr(base, encoder), getattr(merged, encoder)
        name = next(
            n for n in theirs.state_dict() if n.endswith("layers.0.self_attn.q_proj.weight")
        )
        factors = {
            k.split("lora_")[1][0]: v for k, v in state.items() if k.startswith(f"{encoder}.")
        }
        change = ours.state_dict()[name] - theirs.state_dict()[name]
        assert torch.allclose(change, factors["B"] @ factors["A"], atol=1e-5)


def test_a_folder_is_ready_for_the_hub_and_the_card_of_a_run_can_be_written_anew(
    models, runs, tmp_path, capsys
):
    run = runs("sd15", "alpha")
    folder = exported(run, form="folder", output=tmp_path / "whole model")
    card = ModelCard.load(folder / "README.md")
    assert "lora" not in card.data.tags
    assert 'StableDiffusionPipeline.from_pretrained("USER/NAME")' in card.text
    assert f"hf upload USER/NAME '{folder}'" in capsys.readouterr().out
    report = tmp_path / "scores.json"
    content = {"benchmark": "x", "y": 2.0, "intervals": {"y": None}, "confidence": 0.9}
    report.write_text(json.dumps(content))
    exported(run, form="card", results=(report,))
    for path in (run / "README.md", run / "final/README.md"):
        (result,) = ModelCard.load(path).data.eval_results
        assert result.metric_value == 2.0
    with pytest.raises(ConfigError, match="of a finished run"):
        exported(run / "checkpoint-2", form="card")
    report.write_text("{}")
    with pytest.raises(DataError, match="holds no results"):
        exported(run, form="folder", results=(report,), output=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_comparison_of_earlier_weights_is_left_out_of_the_card(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs("sd15", "alpha"), run)
    comparison(run / "compared")
    now = locate_model(ModelSpec(path=str(run))).fingerprint()
    for weights, results in (("0" * 16, 0), (now, 3)):
        (run / "compared/manifest.jsonl").unlink(missing_ok=True)
        row = ManifestRow(
            model="aligned",
            prompt="a",
            prompt_id="a",
            seed=0,
            file="images/aligned/a-0.png",
            sha256="",
            fingerprint=weights,
            sampler={},
        )
        append_rows(run / "compared", [row])
        exported(run, form="card")
        found = ModelCard.load(run / "README.md").data.eval_results or []
        assert len(found) == results
        assert ("about other weights than" in capsys.readouterr().out) is (not results)


def test_a_run_that_was_moved_is_exported_where_it_lies(runs, tmp_path):
    run = runs("sd15", "alpha")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    before = (run / "README.md").read_bytes()
    exported(moved, form="card")
    assert ModelCard.load(moved / "README.md").text.startswith("\n# moved")
    assert (run / "README.md").read_bytes() == before
    file = exported(moved / "final" / KOHYA_FILE)  # a file of a run needs no base
    assert file == moved / "export/moved_lora.safetensors"


def test_the_command_takes_a_run_with_any_name(monkeypatch):
    given = []
    monkeypatch.setattr(export, "run", given.append)
    names = ["runs/a: b", "runs/[1]", "runs/it's", "12", "null"]
    for name in names:
        result = CliRunner().invoke(app, ["export", name, "form=single_file", "dtype=fp16"])
        assert result.exit_code == 0, result.output
    assert [made.run for made in given] == list(map(Path, names))
    assert {(made.form, made.dtype) for made in given} == {("single_file", "fp16")}
    for arguments in ([], ["form=kohya"]):
        result = CliRunner().invoke(app, ["export", *arguments])
        assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize("adapter", ["alpha", "weights"])
def test_a_run_on_another_denoiser_is_exported_with_it(adapter, models, tmp_path):
    torch.manual_seed(3)
    other = opened("sd15", models["sd15"]).unet
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "their unet")
    layouts.write_pickapic(tmp_path / "data", layouts.make_pairs(4))
    run = tmp_path / "run"
    settings = [f"model.path={models['sd15']}", f"model.unet={tmp_path / 'their unet'}"]
    settings += ["model.kind=sd15", f"model.lora={ADAPTERS[adapter]}", "data.resolution=32"]
    settings += [f"data.path={tmp_path / 'data'}", f"output={run}", "optimizer.lr=1e-4"]
    train.run(config.load(RunConfig, SMOKE, settings))
    if adapter == "weights":
        expected = image(opened("sd15", run / "final"))
    else:
        base = opened("sd15", models["sd15"])
        base.unet = other
        base.load_lora_weights(run / "final", weight_name="pytorch_lora_weights.safetensors")
        expected = image(base)
        with safe_open(run / "final" / KOHYA_FILE, framework="pt") as file:
            assert file.metadata()["ss_sd_model_name"] == "their unet"
    for source in (run, run / "checkpoint-2"):
        folder = exported(source, form="folder", output=tmp_path / f"{source.name} whole")
        assert same(image(opened("sd15", folder)), expected)
    assert not same(expected, image(opened("sd15", models["sd15"])))
