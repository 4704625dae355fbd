from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from diffalign.errors import ConfigError
from diffalign.judges.local import Local
from tests.tiny_vlm import tiny_language_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def chat_model(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    tokenizer = tiny_language_tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.set_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_replies_to_each_prompt_alike_each_time_in_the_precision_of_its_file(tmp_path):
    judge = Local(path=str(chat_model(tmp_path)), max_new_tokens=8, device="cpu")
    prompts = ["Rate this response.", "List the objects."]
    replies = dict(judge.replies(prompts))
    assert replies.keys() == {0, 1} and replies[0] != replies[1]
    assert dict(judge.replies(prompts[::-1])) == {0: replies[1], 1: replies[0]}
    _, model = judge._loaded
    assert str(model.dtype) == "torch.bfloat16"
    assert judge._loaded[1] is model  # another attempt does not load it again


def test_what_is_no_chat_model_is_told_by_its_path(tmp_path):
    with pytest.raises(ConfigError, match=f"judge.path={tmp_path} cannot be loaded"):
        list(Local(path=str(tmp_path)).replies(["Rate this response."]))
    judge = Local(path=str(chat_model(tmp_path / "plain", template=None)), device="cpu")
    with pytest.raises(ConfigError, match="no chat template"):
        list(judge.replies(["Rate this response."]))
