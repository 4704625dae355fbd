"""Flags of the scripts of diffusers, TRL and kohya, and the settings that they are here.

Settings are `key.path=value` for every job. Whoever types `--learning_rate 1e-5` out of habit gets
the same command with `optimizer.lr=1e-5` in it, to be pasted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffalign.errors import nearest

_SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True, kw_only=True)
class Here:
    """The counterpart of a flag of another trainer."""

    setting: str = ""
    """`key.path={}` with the place of the value, or without one for a switch; an option such as
    `--resume`; empty where there is nothing like it."""
    note: str = ""
    """The difference, as half a sentence."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Their name for a value -> ours, where they differ."""

    @property
    def key(self) -> str | None:
        """The key path; None where it is no setting."""
        key, equals, _ = self.setting.partition("=")
        return key if equals else None

    @property
    def takes_value(self) -> bool:
        """Whether the flag is followed by a value."""
        return "{}" in self.setting or (not self.setting and not self.note.startswith("switch"))


def _named(*entries: tuple[str, Here]) -> dict[str, Here]:
    """Entries by each of the names that they are given, apart by blanks."""
    return {name: here for names, here in entries for name in names.split()}


_OPTIMISERS = {
    **dict.fromkeys(("AdamW", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("AdamW8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "PagedAdamW8bit": "paged_adamw_8bit",
    "AdaFactor": "adafactor",
    "Prodigy": "prodigy",
    **dict.fromkeys(("AdamWScheduleFree", "schedule_free_adamw"), "schedule_free"),
}
_ATTENTION = {"flash_attention_2": "sdpa", "eager": "default"}
_OBJECTIVES = {"sigmoid": "dpo", "apo_zero": "apo", "apo_down": "apo", "exo_pair": "exo"}

_ANY_RANK = "model.lora.rank=16"

TRAIN = _named(
    # model
    ("pretrained_model_name_or_path model_name_or_path model", Here(setting="model.path={}")),
    ("revision model_revision", Here(setting="model.revision={}")),
    ("variant", Here(setting="model.variant={}")),
    ("pretrained_vae_model_name_or_path vae vae_path", Here(setting="model.vae={}")),
    ("gradient_checkpointing", Here(setting="model.gradient_checkpointing=true")),
    (
        "enable_xformers_memory_efficient_attention xformers",
        Here(setting="model.attention=xformers", note="sdpa is as fast and needs no package"),
    ),
    ("sdpa", Here(setting="model.attention=sdpa")),
    ("attn_implementation", Here(setting="model.attention={}", values=_ATTENTION)),
    ("torch_compile", Here(setting="model.compile=true")),
    ("load_in_4bit", Here(setting="model.quantization=4bit")),
    ("load_in_8bit", Here(setting="model.quantization=8bit")),
    # adapter
    ("rank network_dim lora_r lora_rank", Here(setting="model.lora.rank={}")),
    ("network_alpha lora_alpha", Here(setting="model.lora.alpha={}")),
    ("lora_dropout network_dropout", Here(setting="model.lora.dropout={}")),
    ("lora_target_modules", Here(setting="model.lora.targets=[{}]")),
    ("use_dora", Here(setting="model.lora.dora=true")),
    ("use_rslora", Here(setting="model.lora.rslora=true")),
    ("use_peft use_lora", Here(setting=_ANY_RANK, note="any rank makes it a LoRA")),
    ("network_weights lora_weights", Here(setting="model.lora.start={}")),
    # data
    ("dataset_name train_data_dir instance_data_dir data_path", Here(setting="data.path={}")),
    ("dataset_split_name dataset_train_split split", Here(setting="data.split={}")),
    ("max_train_samples", Here(setting="data.limit={}")),
    ("dataloader_num_workers max_data_loader_n_workers", Here(setting="data.workers={}")),
    ("resolution", Here(setting="data.resolution={}")),
    ("random_flip flip_aug", Here(setting="data.flip=true")),
    ("no_hflip", Here(setting="data.flip=false")),
    ("center_crop", Here(setting="data.crop=center")),
    ("random_crop", Here(setting="data.crop=random")),
    ("enable_bucket", Here(setting="data.buckets=true")),
    ("streaming dataset_streaming", Here(setting="data.streaming=true")),
    ("proportion_empty_prompts caption_dropout_rate", Here(setting="data.caption_dropout={}")),
    ("caption_column image_column", Here(note="columns are mapped by data.columns, docs/data.md")),
    ("max_length max_seq_length", Here(setting="responses.max_length={}")),
    # objective
    ("beta_dpo beta beta_mapo", Here(setting="objective.beta={}")),
    (
        "loss_type",
        Here(setting="objective.kind={}", values=_OBJECTIVES, note="with the keys of that kind"),
    ),
    ("label_smoothing", Here(setting="objective.label_smoothing={}", note="of cdpo and robust")),
    ("precompute_ref_log_probs", Here(setting="reference=cached", note="after precompute")),
    # optimiser
    (
        "learning_rate lr unet_lr",
        Here(setting="optimizer.lr={}", note="applied as written, never scaled"),
    ),
    (
        "lr_scheduler lr_scheduler_type",
        Here(
            setting="optimizer.schedule={}",
            values={"constant_with_warmup": "constant"},
            note="constant, linear or cosine, each after optimizer.warmup_steps",
        ),
    ),
    ("lr_warmup_steps warmup_steps", Here(setting="optimizer.warmup_steps={}")),
    ("warmup_ratio", Here(note="optimizer.warmup_steps is in optimiser steps: ratio times steps")),
    ("use_8bit_adam", Here(setting="optimizer.kind=adamw_8bit")),
    ("optim optimizer optimizer_type", Here(setting="optimizer.kind={}", values=_OPTIMISERS)),
    ("adam_beta1", Here(setting="optimizer.betas=[{}, 0.999]")),
    ("adam_beta2", Here(setting="optimizer.betas=[0.9, {}]")),
    ("adam_weight_decay weight_decay", Here(setting="optimizer.weight_decay={}")),
    ("adam_epsilon", Here(setting="optimizer.eps={}")),
    ("max_grad_norm", Here(setting="optimizer.max_grad_norm={}")),
    ("scale_lr", Here(note="switch: multiply optimizer.lr yourself, by the samples of a step")),
    # length, batch, precision
    (
        "train_batch_size per_device_train_batch_size batch_size",
        Here(setting="training.samples_per_device={}", note="a pair is one sample"),
    ),
    ("gradient_accumulation_steps", Here(setting="training.accumulation={}")),
    ("max_train_steps max_steps", Here(setting="training.optimizer_steps={}")),
    (
        "num_train_epochs max_train_epochs num_epochs",
        Here(note="training.optimizer_steps is the length: epochs times samples / batch"),
    ),
    (
        "mixed_precision",
        Here(setting="training.precision={}", values={"no": "float32", "fp32": "float32"}),
    ),
    ("bf16", Here(setting="training.precision=bf16")),
    ("fp16", Here(setting="training.precision=fp16")),
    ("use_ema", Here(setting="training.ema_decay=0.9999")),
    (
        "checkpointing_steps save_steps save_every_n_steps",
        Here(setting="training.checkpoint_every={}"),
    ),
    ("checkpoints_total_limit save_total_limit", Here(setting="training.keep_checkpoints={}")),
    ("logging_steps", Here(setting="training.log_every={}")),
    # the run
    ("output_dir output_name", Here(setting="output={}")),
    ("seed", Here(setting="seed={}")),
    ("report_to log_with", Here(setting="tracking.trackers=[{}]", values={"none": ""})),
    ("tracker_project_name log_tracker_name", Here(setting="tracking.project={}")),
    ("resume_from_checkpoint resume", Here(setting="--resume-from {}", values={"latest": ""})),
    ("num_processes nproc_per_node", Here(setting="--processes {}")),
    ("multi_gpu", Here(note="switch: --processes N starts a process a GPU")),
    ("push_to_hub", Here(note="switch: afterwards, hf upload OWNER/NAME RUN/final")),
    (
        "hub_model_id hub_token",
        Here(note="afterwards, hf auth login; hf upload OWNER/NAME RUN/final"),
    ),
    (
        "validation_prompt validation_prompts validation_steps validation_epochs",
        Here(note="diffalign generate makes images of base and run side by side afterwards"),
    ),
    ("do_train", Here(note="switch: train is the job's name")),
    ("config config_file dataset_config", Here(note="the config file is the first argument")),
    ("allow_tf32 local_rank ddp_find_unused_parameters", Here(note="nothing has to be set")),
    ("cache_dir", Here(note="the environment variable HF_HOME says where the hub's files go")),
    ("snr_gamma noise_offset", Here(note="there is nothing like it")),
)
"""For `train` and `precompute`."""

GENERATE = _named(
    ("pretrained_model_name_or_path model_name_or_path model", Here(setting="models.base={}")),
    ("lora lora_path network_weights", Here(setting="models.aligned.lora={}")),
    ("prompt prompts validation_prompt", Here(setting="prompts.texts=[{}]")),
    ("prompt_file from_file", Here(setting="prompts={}")),
    ("negative_prompt", Here(setting="sampler.negative_prompt={}")),
    ("num_inference_steps steps", Here(setting="sampler.steps={}")),
    ("guidance_scale cfg_scale scale", Here(setting="sampler.guidance={}")),
    ("scheduler sampler", Here(setting="sampler.scheduler={}")),
    ("height H", Here(setting="sampler.height={}")),
    ("width W", Here(setting="sampler.width={}")),
    ("num_images_per_prompt images_per_prompt n_samples", Here(setting="seeds={}")),
    ("seed", Here(setting="seeds=[{}]")),
    ("batch_size", Here(setting="batch_size={}")),
    ("output_dir outdir output", Here(setting="output={}")),
    ("torch_dtype dtype", Here(setting="dtype={}")),
    ("device", Here(setting="device={}")),
)
"""For `generate`."""

TABLES: Mapping[str, Mapping[str, Here]] = {
    "train": TRAIN,
    "precompute": TRAIN,
    "generate": GENERATE,
}
"""By job."""

_OF_BOTH = ("path", "split", "limit", "workers")
"""Keys that `responses` has as `data` has them."""


def hint(name: str, section: str, fields: Collection[str]) -> str:
    """The end of a message about an unknown key: where the setting of that name is here.

    Args:
        name: the last part of the key.
        section: the dotted keys in front of it; empty at the top level.
        fields: those that may stand there.

    Returns:
        ` Here it is KEY=VALUE`, or nothing where it is no name of another trainer, or where its key
        lies elsewhere than in `section`.
    """
    for table in (TRAIN, GENERATE):
        here = table.get(name.replace("-", "_"))
        if here is None or here.key is None:
            continue
        inside = here.key.removeprefix(f"{section}." if section else "")
        if inside.partition(".")[0] in fields and (not section or inside != here.key):
            return f" Here it is {here.setting.format('VALUE')}"
    return ""


def translation(job: str, arguments: Sequence[str], options: Collection[str]) -> str | None:
    """Translate flags that a job does not have.

    Args:
        job: the command.
        arguments: what follows it on the command line.
        options: the flags that it has, each with its dashes.

    Returns:
        A message with the command as it has to be, or None where no flag is foreign.
    """
    table = TABLES.get(job, {})
    sentences: list[str] = []
    command: list[str] = []
    remaining = list(arguments)
    section = _section_of(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        if not re.match(r"--?[A-Za-z]", flag) or flag in options or len(flag.lstrip("-")) < 2:
            command.append(argument)
            continue
        name = flag.lstrip("-").replace("-", "_")
        here = table.get(name)
        given = [value] if equals else _values(remaining, here)
        del remaining[: 0 if equals else len(given)]
        typed = " ".join([argument, *([] if equals else given)])
        if here is None:
            said, settings = _unknown(flag, given, options, table, section)
        else:
            said, settings = _counterpart(here, given, section)
        sentences.append(f"  {typed}: {said}")
        command += settings
    if not sentences:
        return None
    command = _joined(command)
    if job in ("train", "precompute") and not any(c.endswith((".yaml", ".yml")) for c in command):
        command.insert(0, "CONFIG.yaml")
        sentences.append("  CONFIG.yaml: one whole run; ready-made ones lie in configs/")
    pasteable = " ".join(word if word == "CONFIG.yaml" else shlex.quote(word) for word in command)
    return (
        f"settings of {job} are written key=value and not as flags:\n"
        + "\n".join(sentences)
        + f"\nThe same command:\n  diffalign {job} {pasteable}".rstrip()
    )


def _section_of(arguments: Sequence[str]) -> str:
    """The section that holds the data of the config that is named: `responses`, or `data`."""
    for argument in arguments:
        path = Path(argument)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            return "responses" if re.search(r"^responses:", text, re.MULTILINE) else "data"
    return "data"


def _values(remaining: Sequence[str], here: Here | None) -> list[str]:
    """The arguments behind a flag that belong to it."""
    found: list[str] = []
    for argument in remaining:
        if argument.startswith("--") or _SETTING.fullmatch(argument):
            break
        if argument.endswith((".yaml", ".yml")) and here is not None:
            break
        found.append(argument)
    if here is not None and not here.takes_value:
        is_truth = found[:1] and found[0].lower() in (*_TRUE, *_FALSE)
        return found[:1] if is_truth else []
    return found


def _counterpart(here: Here, given: Sequence[str], section: str) -> tuple[str, list[str]]:
    """The sentence about a flag, and its words in the command."""
    note = here.note.removeprefix("switch: ")
    if not here.setting:
        return note, []
    translated = [here.values.get(value, value) for value in given]
    template = here.setting
    if template.startswith("data.") and template[5:].partition("=")[0] in _OF_BOTH:
        template = template.replace("data", section, 1)
    if not here.takes_value:
        if given and given[0].lower() in _FALSE:
            if not template.endswith("=true"):
                return "leave it out", []
            template = template.replace("=true", "=false")
        words = [template]
    elif template.startswith("--"):
        option, _, _ = template.partition(" ")
        if option == "--resume-from" and translated in ([], [""]):
            words = ["--resume"]
        else:
            words = [option, *(translated or ["N" if option == "--processes" else "FOLDER"])]
    else:
        as_list = "[{}]" in template
        joined = (", " if as_list else " ").join(
            map(_in_list, translated) if as_list else translated
        )
        words = [template.format(joined if given else "VALUE")]
    said = " ".join(map(shlex.quote, words))
    return said + (f" ({note})" if note else ""), words


def _in_list(value: str) -> str:
    """A value as an item of a YAML list."""
    if re.search(r"[,:\[\]{}#&*!|>'\"%@`]|^\s|\s$", value):
        return "'" + value.replace("'", "''") + "'"
    return value


def _unknown(
    flag: str,
    given: Sequence[str],
    options: Collection[str],
    table: Mapping[str, Here],
    section: str,
) -> tuple[str, list[str]]:
    name = flag.lstrip("-")
    if "." in name:
        words = [f"{name}={' '.join(given) or 'true'}"]
        return shlex.quote(words[0]), words
    theirs = {f"--{other}": here for other, here in table.items()}
    allowed = ", ".join(sorted(option for option in options if option.startswith("--")))
    said = f"there is no such flag (flags: {allowed})."
    near = nearest(flag, [*options, *theirs]) or nearest(f"--{name.replace('-', '_')}", theirs)
    if near is None:
        return said, list(given)
    said += f" Did you mean {near}?"
    return said, _counterpart(theirs[near], given, section)[1] if near in theirs else [near, *given]


def _joined(command: list[str]) -> list[str]:
    """Two flags that are one setting here, as that setting."""
    ranks = [word for word in command if word.startswith("model.lora.rank=")]
    if len(ranks) > 1 and _ANY_RANK in ranks:
        command = [word for word in command if word != _ANY_RANK]
    betas = [word for word in command if word.startswith("optimizer.betas=")]
    if len(betas) != 2:
        return command
    first, second = sorted(betas, key=lambda word: word.endswith(", 0.999]"), reverse=True)
    both = f"{first.partition(', ')[0]}, {second.partition(', ')[2]}"
    return [*(word for word in command if word not in betas), both]
