"""The hooks that a config asks for: what may be refused of them, and those of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from diffalign import components
from diffalign.data.source import AbstractSource
from diffalign.errors import ConfigError
from diffalign.generation.text_to_image import SamplerConfig
from diffalign.training.config import RunConfig
from diffalign.training.hooks.base import AbstractHook
from diffalign.training.hooks.health import Health
from diffalign.training.hooks.held_out import HeldOutEvaluation, HeldOutValues
from diffalign.training.hooks.preview_makers import (
    AbstractMaker,
    ImageMaker,
    ResponseMaker,
    SchedulesSampling,
)
from diffalign.training.hooks.previews import Previews, PreviewsConfig


def check_hooks(run: RunConfig) -> None:
    """Raise ConfigError for a hook that this run cannot have, before data or weights are opened."""
    _check_previews(run)


def open_hooks(
    run: RunConfig,
    source: AbstractSource,
    of_held_out: Sequence[HeldOutValues] | None = None,
) -> list[AbstractHook]:
    """The hooks of a run, in the order in which they are called.

    Args:
        run: its config.
        source: of its batches.
        of_held_out: `values_of_held_out`, where the run has no reference of its own.
    """
    hooks: list[AbstractHook] = [settings.open() for settings in run.hooks]
    clip = run.objective.clip_range
    health = run.training.health
    hooks.append(Health(health, run.likelihood.measures, run.output, clip=clip))
    if source.held_out is not None:
        hooks.append(HeldOutEvaluation(source.held_out, run.evaluation, of_held_out))
    if run.previews is not None:
        hooks.append(Previews(run.previews, _maker(run, run.previews)))
    return hooks


def _maker(run: RunConfig, previews: PreviewsConfig) -> AbstractMaker:
    if run.model.makes == "responses":
        return ResponseMaker(
            questions=[(question.text, question.image) for question in previews.questions],
            count=previews.count,
            max_new_tokens=previews.max_new_tokens,
        )
    return ImageMaker(
        cast(SchedulesSampling, run.model),
        prompts=previews.prompts,
        count=previews.count,
        seed=previews.seed,
        sampler=SamplerConfig(steps=previews.steps, guidance=previews.guidance),
    )


def _check_previews(run: RunConfig) -> None:
    if run.previews is None:
        return
    kind = components.kind_of(run.model)
    if run.model.makes is None:
        raise ConfigError(
            f"previews shows images or responses that the policy makes, and the model {kind} makes "
            f"none: remove the section previews"
        )
    given, wanted = ("prompts", "questions")[:: 1 if run.model.makes == "responses" else -1]
    if getattr(run.previews, given):
        raise ConfigError(
            f"previews.{given} is given, and the model {kind} makes {run.model.makes}: give "
            f"previews.{wanted}, or nothing to take those of the data"
        )
    for question in run.previews.questions:
        if question.image is not None and not question.image.is_file():
            raise ConfigError(f"previews.questions: {question.image}: there is no such image")
