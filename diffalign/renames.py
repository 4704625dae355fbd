"""What config keys and kinds were called before: an old config goes on loading for one version.

An entry stays until the version after the one that renamed it. Old names are looked up where a
config is read (`config.load`, overrides included) and where the identity in an old checkpoint is
compared with that of the run that resumes it; whoever uses one is told the new name, once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffalign.errors import ConfigError

KINDS: Mapping[str, Mapping[str, str]] = {
    "rollouts": {
        "whole_image": "d3po",
        "stepwise": "spo",
        "semi_policy": "seppo",
    },
    "synthesis": {
        "retrieve_and_fill": "re_align",
        "collage": "mia_dpo",
        "own_answers": "self_sampled",
    },
}
"""Folder of a family -> its old kinds -> what they are called now."""

FIELDS: Mapping[str, Mapping[str, str]] = {
    # model
    "VLM": {"picture_pixels": "image_pixels"},
    # responses
    "ResponseConfig": {"draws": "visits"},
    # likelihood
    "Tokens": {"together": "concatenated"},
    # rollouts
    "WholeImage": {"pictured_images": "kept_images"},
    "Stepwise": {"pictured_prompts": "rendered_prompts"},
    "SemiPolicy": {"pictured_images": "kept_images"},
    # synthesis
    "Collage": {"max_answer_characters": "max_response_characters"},
    # benchmarks
    "MMHal": {"answers": "responses"},
    "ObjectHalBench": {"answers": "responses"},
    "Pope": {"answers": "responses"},
}
"""Config class -> its old keys -> what they are called now."""

WITHOUT_MEANING: Mapping[str, Mapping[str, Any]] = {
    "Adafactor": {"betas": [0.9, 0.999], "eps": 1e-8},
}
"""Config class -> keys that it had, whose values it never read, as older runs wrote them down."""

Say = Callable[[str], None]

_said: set[str] = set()


def say(sentence: str) -> None:
    """Print a sentence on stderr, once a process and by the first of several ranks."""
    if sentence not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(sentence)
        print(sentence, file=sys.stderr)


def current_kind(family: str, kind: str, *, place: str, key: str) -> str:
    """What a kind is called now.

    Args:
        family: its folder below diffalign, such as `rollouts`.
        kind: as the config has it.
        place, key: file and dotted key of the component, for the sentence.
    """
    now = KINDS.get(family, {}).get(kind)
    if now is not None:
        say(f"{place}: {key}.kind {kind} is called {now} now: write {key}.kind: {now}")
    return now or kind


def current_fields(
    cls: type, tree: Mapping[str, Any], *, place: str, prefix: str
) -> dict[str, Any]:
    """The mapping of a config class under the keys that it has now.

    Args:
        cls: the config class.
        tree: its keys and values.
        place: file, for the sentence.
        prefix: dotted keys in front of it, with the last dot.

    Raises:
        ConfigError: a key is given by both names.
    """
    renamed = FIELDS.get(cls.__name__, {})
    for old, now in renamed.items():
        if old in tree and now in tree:
            raise ConfigError(
                f"{place}: {prefix}{old} is called {prefix}{now} now, and both are given: "
                f"remove {prefix}{old}"
            )
        if old in tree:
            say(f"{place}: {prefix}{old} is called {now} now: write {prefix}{now}")
    unread = WITHOUT_MEANING.get(cls.__name__, {})
    return {
        renamed.get(name, name): value
        for name, value in tree.items()
        if name not in unread or value != unread[name]
    }


def key_in(tree: dict[str, Any], name: str) -> str:
    """Make room for an override in a tree of which no class is known yet.

    A file and an override may mean one key by two names. The old one of them stays, so that the
    sentence is said; what lies under it is moved there.

    Args:
        tree: what the file says at the place of the override.
        name: the override's key.

    Returns:
        The key that is to be set.
    """
    for old, now in _pairs():
        if name == now and old in tree:
            return old
        if name == old and now in tree:
            tree[old] = tree.pop(now)
    return name


def _pairs() -> Iterator[tuple[str, str]]:
    for names in FIELDS.values():
        yield from names.items()


ADDED: dict[str, Any] = {
    "data.annotators": None,
    "data.group_pairs": "all",
    "data.scores.ensemble": [],
    "data.strength.calibrated": False,
    "data.strength.preference.kind": "certain",
    "data.strength.weight": "alike",
    "likelihood.distance": False,
    "likelihood.each_token": False,
    "likelihood.embedding": "none",
    "likelihood.mismatched": False,
    "likelihood.timesteps.distribution": "uniform",
    "likelihood.timesteps.mean": 0.0,
    "likelihood.timesteps.std": 1.0,
    "likelihood.timesteps.shift": 1.0,
    "likelihood.typicality": False,
    "model.candidates": "images",
    "model.channels_last": False,
    "model.posterior": "full",
    "model.vae_tiling": False,
    "objective.clamp_baseline": True,
    "objective.utility": "sigmoid",
    "objective.sides": "sum",
    "rollouts.perturbation.crop": 0.05,
    "rollouts.perturbation.flip": False,
    "rollouts.perturbation.noise": 2.0,
    "rollouts.repeats": 1,
    "rollouts.temperature": None,
    "rollouts.weight": "alike",
    "responses.strength.calibrated": False,
    "responses.strength.preference.kind": "certain",
    "responses.strength.weight": "alike",
    "responses.ties": "drop",
}
"""Settings that an older checkpoint knows nothing of -> what its run did all the same."""


def current_identity(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in an old checkpoint, in the words of the run that resumes it.

    Args:
        saved, ours: flat mappings from dotted config keys to values.

    Returns:
        `saved` with old keys and old kinds replaced wherever `ours` has the new ones, and with
        what was added since.
    """
    current = {key: value for key, value in ADDED.items() if key in ours and key not in saved}
    unread = {f"optimizer.{key}" for keys in WITHOUT_MEANING.values() for key in keys}
    for key, value in saved.items():
        if key in unread - set(ours):
            continue
        head, dot, last = key.rpartition(".")
        names = [f"{head}{dot}{now}" for old, now in _pairs() if old == last and key not in ours]
        name = next((name for name in names if name in ours and name not in saved), key)
        current[name] = _as_now(value, ours.get(name), last)
    return current


def _as_now(saved: Any, ours: Any, key: str) -> Any:
    """A value of an identity; lists hold components of their own."""
    if isinstance(saved, Mapping) and isinstance(ours, Mapping):
        return current_identity(saved, ours)
    if isinstance(saved, list) and isinstance(ours, list) and len(saved) == len(ours):
        return [_as_now(before, now, key) for before, now in zip(saved, ours, strict=True)]
    if key == "kind" and isinstance(saved, str):
        renamed = {family.get(saved) for family in KINDS.values()}
        return ours if ours in renamed else saved
    return saved
