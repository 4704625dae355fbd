"""`diffalign diagnose RUN`: which words a run moved, and where its model looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from diffalign import config as configs
from diffalign.console import progress, silence_libraries
from diffalign.data.batches import TokenBatch
from diffalign.data.decoding import decode
from diffalign.data.responses.chat import ChatEncoder
from diffalign.data.responses.collate import stack_tokens
from diffalign.data.responses.reading import OpenedResponses, open_responses
from diffalign.data.responses.records import IMAGE, ResponsePair
from diffalign.data.responses.samples import TokenSample, TokenSampleMaker
from diffalign.errors import ConfigError, DataError
from diffalign.files import write_atomically, writing
from diffalign.jobs.demo_responses import opened
from diffalign.likelihoods.token_heat import patches_looked_at, response_log_probs, seen_image
from diffalign.models.runs import CONFIG, FINAL, is_run
from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.ranges import AtLeast, Ranged
from diffalign.reports.diagnosis import (
    DiagnosedPair,
    DiagnosedResponse,
    diagnosis_page,
    token_texts,
    words_of,
)
from diffalign.training.config import RunConfig

PAGE = "diagnosis.html"
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(Ranged):
    """Which responses of which run are looked at."""

    run: Path
    """Folder of a finished run on responses."""
    data: Path | None = None
    """Another data set of the same columns, such as one that was not trained on; null takes that of
    the run."""
    samples: Annotated[int, AtLeast(1)] = 6
    """Pairs, the first ones of the data set."""
    output: Path | None = None
    """The page; null is `diagnosis.html` in the folder of the run."""


def run(config: DiagnoseConfig) -> Path:
    """Measure the responses under the model before and after, and write the page.

    Returns:
        The page.

    Raises:
        ConfigError: it is no finished run on pairs of responses.
        DataError: the data set has no usable pair.
    """
    console = Console(highlight=False)
    silence_libraries()
    settings, run_config = _settings(config)
    assert run_config.responses is not None  # `_settings` checked
    responses = run_config.responses
    if config.data is not None:
        responses = replace(responses, path=str(config.data))
    data = open_responses(replace(responses, workers=0))
    encoder = ChatEncoder(settings.processor(), max_length=responses.max_length)
    maker = TokenSampleMaker(
        config=responses, views=frozenset(_SIDES), run_seed=run_config.seed, encoder=encoder
    )
    found = _samples(data, maker, config.samples)
    # One after the other: two models need not fit into memory together.
    before = _log_probs(opened(settings, None), found, console, "before")
    policy = opened(settings, config.run)
    now = _log_probs(policy, found, console, "after")
    pairs = [
        _diagnosed(policy, pair, sample, before[n], now[n])
        for n, (pair, sample) in enumerate(found)
    ]
    output = config.output or config.run / PAGE
    page = diagnosis_page(
        f"What {config.run.name} moved",
        pairs,
        lead=f"{len(pairs)} pairs of {data.summary}; log-ratios of the trained model and the one "
        f"that it started from. Bright is what the trained model's response hangs on.",
    )
    with writing(output):
        write_atomically(output, page)
    console.print(f"[green]Done:[/green] {escape(str(output))}", soft_wrap=True)
    console.print(f"Next: open {output} in a browser", markup=False, soft_wrap=True)
    return output


def _settings(config: DiagnoseConfig) -> tuple[VLM, RunConfig]:
    if not is_run(config.run):
        raise ConfigError(
            f"{config.run}: is not the folder of a training run (it has no {CONFIG}): give the "
            f"`output` of a diffalign train on responses"
        )
    run_config = configs.load(RunConfig, config.run / CONFIG)
    if run_config.responses is None or not isinstance(run_config.model, VLM):
        raise ConfigError(
            f"{config.run}: trained no responses of a vision-language model, and words are looked "
            f"at here; diffalign report shows what a run on images did"
        )
    if not (config.run / FINAL).is_dir():
        raise ConfigError(
            f"{config.run}: has no folder named {FINAL}, so it has not finished: continue it with "
            f"diffalign train {config.run / CONFIG} --resume"
        )
    return run_config.model, run_config


def _samples(
    data: OpenedResponses, maker: TokenSampleMaker, count: int
) -> list[tuple[ResponsePair, TokenSample]]:
    """The first usable pairs, and what is measured of them."""
    found: list[tuple[ResponsePair, TokenSample]] = []
    for pair in (p for n in range(len(data.rows)) for p in data.pairs_of(data.rows[n])):
        if not isinstance(pair, ResponsePair) or not set(_SIDES) <= pair.responses.keys():
            continue
        sample = maker.make(pair, 0)
        if isinstance(sample, TokenSample):
            found.append((pair, sample))
        if len(found) == count:
            return found
    if not found:
        raise DataError(
            f"{data.summary}: has no usable pair of a chosen and a rejected response; diffalign "
            f"train CONFIG.yaml --dry-run says why"
        )
    return found


def _batch(model: VisionLanguageModel, sample: TokenSample) -> TokenBatch:
    return stack_tokens([sample], model.pad_token_id)


def _log_probs(
    model: VisionLanguageModel,
    found: Sequence[tuple[ResponsePair, TokenSample]],
    console: Console,
    when: str,
) -> list[dict[str, Tensor]]:
    measured = []
    with progress(console, f"model {when}", len(found), unit="pairs") as advance:
        for _, sample in found:
            batch = _batch(model, sample)
            measured.append({side: response_log_probs(model, batch, side) for side in _SIDES})
            advance(1)
    return measured


def _diagnosed(
    policy: VisionLanguageModel,
    pair: ResponsePair,
    sample: TokenSample,
    before: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
) -> DiagnosedPair:
    batch = _batch(policy, sample)
    responses = []
    for side in _SIDES:
        texts = token_texts(pair.responses[side], sample.responses[side].offsets.tolist())
        looked_at = patches_looked_at(policy, batch, side)
        responses.append(
            DiagnosedResponse(
                name=side,
                words=words_of(texts, now[side].tolist(), before[side].tolist()),
                looked_at=None if looked_at is None else looked_at.numpy(),
            )
        )
    return DiagnosedPair(
        sample_id=pair.sample_id,
        prompt="\n".join(turn.text.replace(IMAGE, "").strip() for turn in pair.turns),
        image=decode(pair.images[0]) if pair.images else None,
        seen=seen_image(policy, batch),
        responses=responses,
    )
