"""Steps of TRL's DPOTrainer for bench_vlm.py, in a Python of their own: ours and TRL's versions of
transformers need not agree.

    PYTHON scripts/trl_steps.py FOLDER      # where PYTHON has trl and peft

FOLDER holds what bench_vlm.py wrote: `model/`, `adapter.safetensors`, `batch.safetensors` and
`settings.json`. Prints a line of JSON with the versions, then one for every line that comes in: the
loss of a `training_step`, its seconds (of the CPU; on a GPU of the clock) and the bytes that it
took on top of what was there before.

TRL computes log-probabilities of the responses' tokens alone (its compact path) on GPUs, and of all
tokens on CPUs. `compact` in the settings asks for the former on any device.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def clock() -> float:
    """Seconds of this process's CPU time; on a GPU of the clock, its work waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class PeakMemory:
    """Bytes that something takes at its worst, on top of what is there already."""

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # memory that was given back is no longer counted
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.found = torch.cuda.max_memory_allocated() - self._before
        else:
            self.found = self._read("VmHWM") - self._before if sys.platform == "linux" else 0

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def trainer_of(folder: Path, settings: dict[str, Any]) -> Any:
    """A DPOTrainer of the model with the adapter; its data set is a stand-in and is not read."""
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

    if settings["compact"]:
        if not hasattr(trl.trainer.utils, "_use_triton"):
            raise SystemExit(f"TRL {trl.__version__} chooses its path otherwise: bench 1.16")
        trl.trainer.utils._use_triton = lambda _: True
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = trl.DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(folder / "trl"),
            beta=settings["beta"],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list([pair]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"]
        ),
    )
    trainer.current_gradient_accumulation_steps = 1  # which `train` says of every step
    known = load_file(folder / "adapter.safetensors")
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    if len(trained) != len(known):
        raise SystemExit(f"TRL trains {len(trained)} tensors, and the adapter has {len(known)}")
    for name, value in known.items():
        trained[f"base_model.model.{name}"].data.copy_(value)
    return trainer


def main(folder: Path) -> None:
    import transformers
    import trl

    settings = json.loads((folder / "settings.json").read_text())
    trainer = trainer_of(folder, settings)
    batch = load_file(folder / "batch.safetensors")
    model = trainer.model.train()
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        given = {key: value.clone() for key, value in batch.items()}
        with PeakMemory() as memory:
            started = clock()
            loss = trainer.training_step(model, given)
            seconds = clock() - started
        model.zero_grad(set_to_none=True)
        step = {"loss": loss.item(), "seconds": seconds, "bytes": memory.found}
        print(json.dumps(step), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
