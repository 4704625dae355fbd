"""diffalign: preference alignment of image generators and vision-language models.

The names that programs import, each loaded when it is first asked for:

    from pathlib import Path
    import diffalign

    run = diffalign.load_config(diffalign.RunConfig, Path("configs/playground/diffusion_dpo.yaml"))
    diffalign.train(run)

    DPO = diffalign.find_kind(diffalign.AbstractObjective, "dpo")
    views = {view: diffalign.Likelihoods(policy=..., reference=...) for view in DPO.views}
    loss = DPO(beta=0.1)(views).loss

`load_config` makes any config dataclass from a file and overrides, `find_kind` is what `kind: x` of
a config finds, and `train`, `generate`, `score`, `compare`, `evaluate` and `export` are the jobs of
the command line, which take such a config.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.benchmarks.base import AbstractBenchmark
    from diffalign.components import find as find_kind
    from diffalign.config import load as load_config
    from diffalign.errors import DiffalignError
    from diffalign.jobs.compare import CompareConfig
    from diffalign.jobs.compare import run as compare
    from diffalign.jobs.evaluate import run as evaluate
    from diffalign.jobs.export import ExportConfig
    from diffalign.jobs.export import run as export
    from diffalign.jobs.generate import GenerateConfig
    from diffalign.jobs.generate import run as generate
    from diffalign.jobs.score import ScoreConfig
    from diffalign.jobs.score import run as score
    from diffalign.jobs.train import run as train
    from diffalign.likelihoods.base import AbstractLikelihood
    from diffalign.objectives.base import AbstractObjective, Likelihoods, LossOutput
    from diffalign.scorers.base import AbstractScorer
    from diffalign.training.config import RunConfig

__version__ = "0.1.0"


def _round_alike_everywhere() -> None:
    """Have Intel's MKL round a product in one way, wherever its numbers lie in memory.

    Else a resumed run would not end alike (seen on CPUs with AMX). MKL reads it once, before its
    first product; on other makers' CPUs it would choose slow kernels, and is left alone.
    """
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123  # pathlib is slow to import
            if "GenuineIntel" in file.read(4096):
                os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    except OSError:  # no Linux
        pass


_round_alike_everywhere()

_HOMES = {
    "AbstractBenchmark": "diffalign.benchmarks.base:AbstractBenchmark",
    "AbstractLikelihood": "diffalign.likelihoods.base:AbstractLikelihood",
    "AbstractObjective": "diffalign.objectives.base:AbstractObjective",
    "AbstractScorer": "diffalign.scorers.base:AbstractScorer",
    "CompareConfig": "diffalign.jobs.compare:CompareConfig",
    "DiffalignError": "diffalign.errors:DiffalignError",
    "ExportConfig": "diffalign.jobs.export:ExportConfig",
    "GenerateConfig": "diffalign.jobs.generate:GenerateConfig",
    "Likelihoods": "diffalign.objectives.base:Likelihoods",
    "LossOutput": "diffalign.objectives.base:LossOutput",
    "RunConfig": "diffalign.training.config:RunConfig",
    "ScoreConfig": "diffalign.jobs.score:ScoreConfig",
    "compare": "diffalign.jobs.compare:run",
    "evaluate": "diffalign.jobs.evaluate:run",
    "export": "diffalign.jobs.export:run",
    "find_kind": "diffalign.components:find",
    "generate": "diffalign.jobs.generate:run",
    "load_config": "diffalign.config:load",
    "score": "diffalign.jobs.score:run",
    "train": "diffalign.jobs.train:run",
}
"""Public names -> module:name. None of these modules is imported with the package, so that
`import diffalign` takes a few milliseconds and loads no torch."""

__all__ = [
    "AbstractBenchmark",
    "AbstractLikelihood",
    "AbstractObjective",
    "AbstractScorer",
    "CompareConfig",
    "DiffalignError",
    "ExportConfig",
    "GenerateConfig",
    "Likelihoods",
    "LossOutput",
    "RunConfig",
    "ScoreConfig",
    "compare",
    "evaluate",
    "export",
    "find_kind",
    "generate",
    "load_config",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562); kept, so that it is looked for once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
