"""Collects a round; `test_stepwise.py` runs it in each of two processes, and once by itself."""

import json
import sys
from itertools import takewhile
from pathlib import Path

import torch
from accelerate import PartialState

from diffalign import world
from diffalign.generation.prompts import PromptsConfig
from diffalign.models.diffusion.reverse import ReverseProcess
from diffalign.models.diffusion.sd15 import SD15
from diffalign.models.lora import LoraSettings
from diffalign.rollouts.spo import Stepwise
from tests.rollouts.noisy_brightness import NoisyBrightness
from tests.rollouts.runs import row_metadata


def collect(model_folder: str, output: Path) -> list[list[str]]:
    """Sample ids of this rank's micro-batches of one round; four rows over all ranks."""
    settings = SD15(path=model_folder, lora=LoraSettings(rank=2))
    rollouts = Stepwise(
        prompts=PromptsConfig(texts=("a cat", "a dog", "an owl", "a bat", "fog")),
        scorer=NoisyBrightness(),
        prompts_per_round=5,
        prompts_per_batch=2,
        candidates=3,
        first_step=1,
        threshold=0.03,
        previewed_prompts=1,
    )
    source = rollouts.open(
        row_metadata(
            output / "rounds",
            model=settings,
            samples_per_device=4 // world.size(),
            process=ReverseProcess(steps=4, guidance=2.0),
        )
    )
    model = settings.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="adapter_off"
    )
    source.bind(model)
    ids = (list(batch.sample_ids) for batch in source)
    return list(takewhile(lambda batch: batch[0].startswith("round-0/"), ids))


if __name__ == "__main__":
    state = PartialState(cpu=True)
    folder = Path(sys.argv[2])
    seen = collect(sys.argv[1], folder)
    (folder / f"rank-{world.rank()}.json").write_text(json.dumps(seen))
    state.wait_for_everyone()
    state.destroy_process_group()
