"""A judge on this machine: a chat model of transformers, greedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffalign import hub
from diffalign.errors import ConfigError
from diffalign.judges.base import AbstractJudge


@dataclass(frozen=True, kw_only=True)
class Local(AbstractJudge):
    """A language model that transformers loads, one prompt at a time."""

    path: str
    """Folder or hub id of a chat model with safetensors."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its default branch."""
    max_new_tokens: int = 1024
    """A reply ends there at the latest."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""

    @property
    def name(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for place, prompt in enumerate(prompts):
            yield place, self._reply(prompt)

    def _reply(self, prompt: str) -> str:
        import torch

        tokenizer, model = self._loaded
        try:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
        except ValueError as error:
            raise ConfigError(f"judge.path={self.path} has no chat template: {error}") from error
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        reply = written[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(reply, skip_special_tokens=True))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and model, in the precision that its file has."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from diffalign.models.devices import choose_device

        device = choose_device(self.device)
        revision = self.revision or "main"
        try:
            with hub.explained(
                self.path, kind="model", error=ConfigError, field="judge.path", section="judge"
            ):
                tokenizer = AutoTokenizer.from_pretrained(self.path, revision=revision)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    self.path, revision=revision, dtype="auto", use_safetensors=True
                )
        except (OSError, ValueError) as error:
            raise ConfigError(f"judge.path={self.path} cannot be loaded: {error}") from error
        return tokenizer, model.to(device).eval()
