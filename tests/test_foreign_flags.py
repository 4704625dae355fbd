"""Flags of other trainers get the setting that they are here, in a command that can be pasted."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import typing
from pathlib import Path

import pytest

from diffalign import arguments, cli, components, config, foreign_flags
from diffalign.errors import ConfigError
from diffalign.jobs.generate import GenerateConfig
from diffalign.training.config import RunConfig
from diffalign.training.optimizers.base import AbstractOptimizer

CONFIGS = {"train": RunConfig, "precompute": RunConfig, "generate": GenerateConfig}
CONFIG = "configs/smoke/diffusion_dpo_sdxl.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Configs are named from there."""
    monkeypatch.chdir(Path(__file__).parents[1])


def translated(*arguments: str, job: str = "train") -> str:
    """What is said of a command line."""
    said = foreign_flags.translation(job, arguments, {"--resume", "--dry-run", "--help"})
    assert said is not None
    return said


def command(*arguments: str, job: str = "train") -> list[str]:
    """The words of the command that is to be pasted."""
    return shlex.split(translated(*arguments, job=job).rpartition("\n")[2])


def dataclasses_in(hint: typing.Any) -> list[type]:
    """What a field of this type may hold: of an abstract family, every kind."""
    if inspect.isclass(hint) and inspect.isabstract(hint):
        return [components.find(hint, kind) for kind in components.kinds(hint)]
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in typing.get_args(hint) for found in dataclasses_in(part)]


def exists(classes: list[type], key: str) -> bool:
    """Whether a dotted key leads to a field, of some kind where there are several."""
    name, _, rest = key.partition(".")
    for cls in classes:
        if name == "kind":
            return True
        hints = typing.get_type_hints(cls)
        if name in hints and not rest:
            return True
        if name in hints and typing.get_origin(hints[name]) is dict:
            return True  # a name of the user's own
        if name in hints and exists(dataclasses_in(hints[name]), rest):
            return True
    return False


@pytest.mark.parametrize("job", foreign_flags.TABLES)
def test_every_key_that_is_named_exists(job):
    keys = {here.key for here in foreign_flags.TABLES[job].values() if here.key}
    assert len(keys) > 10
    assert [key for key in sorted(keys) if not exists([CONFIGS[job]], key)] == []
    assert not exists([CONFIGS[job]], "optimizer.learning_rate")


def test_values_for_which_there_is_a_name_are_ones_that_the_config_allows():
    hints = typing.get_type_hints(AbstractOptimizer)
    wanted = {
        "optimizer.kind={}": components.kinds(AbstractOptimizer),
        "optimizer.schedule={}": typing.get_args(hints["schedule"]),
    }
    for here in foreign_flags.TRAIN.values():
        if here.setting in wanted:
            allowed = wanted[here.setting]
            assert set(here.values.values()) <= set(allowed)


def test_the_command_of_a_diffusers_user_becomes_one_that_loads():
    words = command(
        CONFIG,
        "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0",
        *("--learning_rate", "1e-5", "--train_batch_size", "2"),
        *("--gradient_accumulation_steps", "4", "--max_train_steps", "20", "--report_to"),
        *("wandb", "tensorboard", "--mixed_precision", "no", "--use_8bit_adam"),
        *("--gradient_checkpointing", "--rank", "8", "--beta_dpo", "5000", "--seed", "7"),
        *("--output_dir", "out here", "--dataset_name", "owner/name", "--adam_beta2", "0.98"),
        *("--adam_beta1", "0.8", "--lr_scheduler", "constant_with_warmup", "--dry-run"),
    )
    assert words[:3] == ["diffalign", "train", CONFIG] and "--dry-run" in words
    run = config.load(
        RunConfig, arguments.split(words[2:3])[0], [w for w in words[3:] if w[0] != "-"]
    )
    assert run.optimizer.lr == 1e-5 and components.kind_of(run.optimizer) == "adamw_8bit"
    assert run.optimizer.betas == (0.8, 0.98) and run.optimizer.schedule == "constant"
    assert run.training.samples_per_device == 2 and run.training.precision == "float32"
    assert run.training.accumulation == 4 and run.training.optimizer_steps == 20
    assert run.tracking.trackers == ("wandb", "tensorboard")
    assert str(run.output) == "out here" and run.data is not None and run.seed == 7
    assert run.data.path == "owner/name"
    assert run.model.lora.rank == 8 and run.model.gradient_checkpointing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--per_device_train_batch_size 4", "training.samples_per_device=4"),
        ("--network_dim=32 --network_alpha 16", "model.lora.rank=32 model.lora.alpha=16"),
        ("--use_peft --lora_r 64", "model.lora.rank=64"),
        ("--lora_r 64 --use_peft True", "model.lora.rank=64"),
        ("--use_peft", "model.lora.rank=16"),
        ("--lora_target_modules q_proj v_proj", "'model.lora.targets=[q_proj, v_proj]'"),
        ("--resume_from_checkpoint latest", "--resume"),
        ("--resume_from_checkpoint runs/a/checkpoint-5", "--resume-from runs/a/checkpoint-5"),
        ("--enable_xformers_memory_efficient_attention", "model.attention=xformers"),
        ("--bf16 True --learning-rate 1e-5", "training.precision=bf16 optimizer.lr=1e-5"),
        ("--gradient_checkpointing false", "model.gradient_checkpointing=false"),
        ("--optim adamw_bnb_8bit", "optimizer.kind=adamw_8bit"),
        (
            "--optimizer.lr=1e-4 --training.accumulation 2",
            "optimizer.lr=1e-4 training.accumulation=2",
        ),
        ("--learning_rate", "optimizer.lr=VALUE"),
        ("--lr 1e-5 --dry-run", "optimizer.lr=1e-5 --dry-run"),
        ("--resolution 512 seed=1", "data.resolution=512 seed=1"),
    ],
)
def test_a_flag_becomes_a_setting(typed, said):
    assert translated(CONFIG, *typed.split()).endswith(f"diffalign train {CONFIG} {said}")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--push_to_hub", "hf upload OWNER/NAME"),
        ("--num_train_epochs 3", "training.optimizer_steps is the length"),
        ("--validation_prompts a b", "diffalign generate"),
        ("--scale_lr", "multiply optimizer.lr yourself"),
        ("--learning_rat 3", "there is no such flag (flags: --dry-run, --help, --resume)"),
        ("--learning_rat 3", "Did you mean --learning_rate?"),
    ],
)
def test_a_flag_without_a_setting_is_explained_and_left_out(typed, said):
    assert said in translated(CONFIG, *typed.split())
    assert "--" not in command(CONFIG, *typed.split())[-1]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--dryrun", "--dry-run"), ("--resum", "--resume"), ("--learning-rat 3", "optimizer.lr=3")],
)
def test_the_command_has_what_a_misspelt_flag_means(typed, meant):
    assert command(CONFIG, *typed.split()) == ["diffalign", "train", CONFIG, meant]


def test_data_of_responses_goes_where_a_config_of_responses_has_it():
    config_file = "configs/dpo/llava15_7b.yaml"
    assert command(config_file, "--dataset_name", "a/b")[-1] == "responses.path=a/b"
    assert command(CONFIG, "--dataset_name", "a/b")[-1] == "data.path=a/b"


def test_a_command_without_a_config_says_where_they_are():
    said = translated("--pretrained_model_name_or_path", "a/b")
    assert "ready-made ones lie in configs/" in said
    assert said.endswith("diffalign train CONFIG.yaml model.path=a/b")


def test_generate_has_flags_of_its_own():
    words = command(
        *("--prompt", "a fox: red, 'small'", "--num_inference_steps", "30", "--seed", "3"),
        *("models.base=x", "output=y"),
        job="generate",
    )
    generate = config.load(GenerateConfig, None, words[2:])
    assert generate.prompts.texts == ("a fox: red, 'small'",)  # type: ignore[union-attr]
    assert generate.sampler.steps == 30 and generate.seeds == (3,)


def test_known_flags_and_settings_are_left_alone():
    arguments = [CONFIG, "optimizer.lr=1e-5", "--dry-run", "--resume", "sampler.eta=-1", "--help"]
    assert (
        foreign_flags.translation("train", arguments, {"--dry-run", "--resume", "--help"}) is None
    )


def test_the_command_line_responses_before_anything_is_loaded(monkeypatch, capsys):
    arguments = ["diffalign", "train", CONFIG, "--learning_rate", "1e-5", "--processes", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    said = capsys.readouterr().err
    assert exit_info.value.code == 1
    assert said.endswith(f"diffalign train {CONFIG} optimizer.lr=1e-5 --processes 2\n")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learning_rate=1e-5", "Here it is optimizer.lr=VALUE"),
        ("optimizer.learning_rate=1e-5", "Here it is optimizer.lr=VALUE"),
        ("model.rank=4", "Here it is model.lora.rank=VALUE"),
        ("report_to=wandb", r"Here it is tracking.trackers=\[VALUE\]"),
        ("training.max_train_steps=4", "Here it is training.optimizer_steps=VALUE"),
    ],
)
def test_a_name_of_another_trainer_as_a_key_is_answered_too(override, said):
    with pytest.raises(ConfigError, match=said):
        config.load(RunConfig, arguments.split([CONFIG])[0], [override])
