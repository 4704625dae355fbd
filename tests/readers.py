"""Every reader of the package with a sound file of its kind, to be damaged in every way.

`damaged` changes bytes, cuts, repeats and swaps parts, and for text also puts other values where
values stand; `outcome` says what the reader made of it. Used by the suite and by `scripts/fuzz.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save

from diffalign import config
from diffalign.benchmarks.amber import files as amber
from diffalign.benchmarks.chair import rules as chair
from diffalign.benchmarks.mmhal import rules as mmhal
from diffalign.benchmarks.object_halbench import rules as object_halbench
from diffalign.benchmarks.pope import rules as pope
from diffalign.cache.references import CachedReference, Contents, ReferenceWriter
from diffalign.comparison.diversity import read_diversity
from diffalign.comparison.score import find_images, read_column
from diffalign.data.decoding import BadImageError, decode
from diffalign.data.pairs.columns import ImagePair
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.formats.opa_dpo import OPADPO
from diffalign.data.responses.formats.rlhf_v import RLHFV
from diffalign.data.responses.reading import open_responses
from diffalign.data.skipping import SkipLog, UnusableRowError
from diffalign.errors import ConfigError, DiffalignError
from diffalign.files import read_tensors
from diffalign.generation.manifest import read_manifest
from diffalign.generation.prompts import read_prompts
from diffalign.generation.responses import _kept
from diffalign.judges.base import AbstractJudge, fill, read_template, verdicts
from diffalign.models.adapter_files import PEFT_PREFIX, read_adapter
from diffalign.models.locate import locate
from diffalign.models.preference.clip_loading import read_state
from diffalign.response_rules.coco_objects import (
    ObjectWords,
    Synonyms,
    coco_objects,
    read_image_objects,
    read_synonyms,
)
from diffalign.rollouts.groups import read_groups, read_origin
from diffalign.rollouts.preferences import read_preferences
from diffalign.rollouts.rounds import _read, _Round
from diffalign.rollouts.store import read_steps, step_batch
from diffalign.scorers.geneval.rules import read_requirements
from diffalign.synthesis.journal import Journal, _digest
from diffalign.synthesis.pairing import parse_correction, read_corrections, read_scores
from diffalign.training.card import read_evaluations
from diffalign.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from diffalign.training.config import RunConfig
from diffalign.training.hooks.records import JsonLines

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs/smoke/diffusion_dpo_sdxl.yaml"


@dataclass(frozen=True)
class Reader:
    """A reader and a file that it reads."""

    file: str
    """Its name, in a folder of its own."""
    good: Callable[[], bytes]
    read: Callable[[Path], Any]
    """Takes the file's path."""
    next_to: Callable[[Path], Any] = lambda folder: None
    """Writes what lies next to it."""
    allowed: tuple[type[Exception], ...] = ()
    """What its contract names next to `DiffalignError`."""


def outcome(reader: Reader, folder: Path, content: bytes) -> str:
    """`read` or `refused`.

    Raises:
        Exception: whatever else the reader raised.
    """
    path = folder / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        reader.read(path)
    except (DiffalignError, *reader.allowed):
        return "refused"
    return "read"


@dataclass(frozen=True, kw_only=True)
class Repeating(AbstractJudge):
    """A judge that says what it is asked."""

    name = "j"

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        return iter(enumerate(prompts))


_VALUES = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"9" * 5000,
    b"0x" + b"f" * 3000,
    b'""',
    b'"a\\u0000b"',
    b'"\\ud83d"',
    b'"../../x"',
    b'"/etc/passwd"',
    b"[]",
    b"{}",
    b"[[1, [2]]]",
    b'{"a": {"b": []}}',
    b"[" * 3000,
    b"&a [*a]",
    b"!!int x",
    b"2001-13-45",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"caf\xe9",
    b"\x00",
    b"\r\n",
    b"\xe2\x80\xa8",
]
_STOPS = b",:[]{}\"'\n\t= "


def damaged(good: bytes, chance: random.Random) -> bytes:
    """A sound file with one to four faults, or something else altogether."""
    if chance.random() < 0.03:
        return chance.choice([b"", chance.randbytes(chance.randrange(200)), *_VALUES])
    content = good
    for _ in range(chance.choice([1, 1, 1, 2, 3, 4])):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice([0, 1, 1, 2, 8, 40]))
        kind = chance.randrange(7)
        if kind == 0:
            content = content[:start] + chance.randbytes(end - start + 1) + content[end:]
        elif kind == 1:
            content = content[:start]
        elif kind == 2:
            content = content[:start] + content[end:]
        elif kind == 3:
            content = content[:start] + content[start:end] * 2 + content[end:]
        else:
            start, end = _value_at(content, start)
            content = content[:start] + chance.choice(_VALUES) + content[end:]
    return content


def _value_at(content: bytes, place: int) -> tuple[int, int]:
    """Where the value around a place begins and ends, as far as it can be told."""
    start, end = place, place
    while start > 0 and content[start - 1] not in _STOPS:
        start -= 1
    while end < len(content) and content[end] not in _STOPS:
        end += 1
    if start > 0 and end < len(content) and content[start - 1 : start] == content[end : end + 1]:
        return (start - 1, end + 1) if content[end : end + 1] == b'"' else (start, end)
    return start, end


def _json(value: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def _lines(*rows: Any) -> Callable[[], bytes]:
    return lambda: "".join(json.dumps(row) + "\n" for row in rows).encode()


def _text(text: str) -> Callable[[], bytes]:
    return lambda: text.encode()


@lru_cache
def _image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(stream, kind)
    return stream.getvalue()


def _write_images(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(_image("png"))


def _tensors(metadata: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> bytes:
    return save({name: torch.ones(shape) for name, shape in shapes.items()}, metadata)


def _pickled() -> bytes:
    stream = io.BytesIO()
    torch.save({"x": torch.ones(3)}, stream)
    return stream.getvalue()


def _checkpoint(folder: Path) -> Path:
    tensors = {"weights": {"x": torch.ones(2)}, "rank-0": {"y": torch.ones(1)}}
    return save_checkpoint(folder, Checkpoint(step=1, tensors=tensors, state={}), keep=1)


def _state() -> bytes:
    with TemporaryDirectory() as folder:
        return (_checkpoint(Path(folder)) / "state.json").read_bytes()


@lru_cache
def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for name, content in {
            "0.chosen.png": _image("png"),
            "0.rejected.png": _image("png"),
            "0.txt": b"a caption",
            "1.chosen.png": _image("png"),
            "1.rejected.png": _image("png"),
            "1.json": b'{"caption": "b"}',
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@lru_cache
def _parquet() -> bytes:
    image = {"bytes": _image("png"), "path": "a.png"}
    rows = [{"caption": "a", "chosen": image, "rejected": image}] * 3
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def _pairs(path: Path, **settings: Any) -> None:
    """All rows of a data set of image pairs, each as far as its first pixel."""
    data = open_data(PairConfig(path=str(path), resolution=8, buckets=False, **settings))
    for pair in data.pairs():
        if isinstance(pair, ImagePair):
            with contextlib.suppress(BadImageError):
                decode(pair.chosen, max_pixels=1 << 20)


def _responses(path: Path) -> None:
    data = open_responses(ResponseConfig(path=str(path)))
    for number in range(len(data.rows)):
        for place, _ in enumerate(data.comparisons(data.rows[number])):
            data.pair(number, place)


def _mapped(mapping: Any, column: str, **others: Any) -> Callable[[Path], Any]:
    return lambda path: mapping.comparisons(
        {**others, column: path.read_bytes().decode(errors="surrogateescape")}
    )


_CONTENTS = Contents(
    fingerprint={"model": "m"}, views=("chosen",), visits=1, pairs=2, pairs_per_shard=2
)
_SHARD = "draw-0-pairs-00000000.safetensors"


def _index() -> bytes:
    return json.dumps(
        {
            "fingerprint": {"model": "m"},
            "views": ["chosen"],
            "draws": 1,
            "pairs": 2,
            "pairs_per_shard": 2,
        }
    ).encode()


def _cached(path: Path) -> None:
    CachedReference.open(
        path.parent, fingerprint={"model": "m"}, views=frozenset({"chosen"}), visits=1
    )


def _shard() -> bytes:
    return _tensors({"sample_ids": '["a", "b"]'}, chosen=(2,))


def _contents() -> Contents:
    return Contents(
        fingerprint={"model": "m"}, views=("chosen",), visits=1, pairs=2, pairs_per_shard=2
    )


def _computed(folder: Path) -> ReferenceWriter:
    """Reference values as they are written today: index and shard."""
    writer = ReferenceWriter(folder, _contents())
    for shard in writer.missing():
        writer.write(shard, ["a", "b"], {"chosen": torch.zeros(2)})
    return writer


def _file_of(write: Callable[[Path], object], name: str) -> bytes:
    with TemporaryDirectory() as folder:
        write(Path(folder))
        return (Path(folder) / name).read_bytes()


_ORIGIN = {
    "policy": "p",
    "prediction": "epsilon",
    "schedule": "s",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "steps": 2,
    "guidance": 5.0,
    "eta": 1.0,
}
_GROUP = {
    "group": "a-0",
    "prompt": "a",
    "prompt_id": "a",
    "seed": 0,
    "images": ["images/a-0.png"],
    "trajectories": "t.safetensors",
}


def _trajectories() -> bytes:
    header = {"origin": _ORIGIN, "dtype": "float32", "size": [8, 8], "prompt": "a", "seed": 0}
    return _tensors({"diffalign": json.dumps(header)}, latents=(4, 2), log_likelihoods=(2, 1))


def _list_group(folder: Path) -> None:
    (folder / "groups.jsonl").write_bytes(_lines(_GROUP)())


def _origins(path: Path) -> list[Any]:
    return [read_origin(path.parent, group) for group in read_groups(path.parent)]


_STEP = {
    "sample_id": "a",
    "prompt": "a",
    "file": "latents.safetensors",
    "t": 5,
    "t_next": 3,
    "states": {"chosen": 0, "rejected": 0},
    "outcomes": {"chosen": 1, "rejected": 2},
}


def _steps(path: Path) -> None:
    if steps := read_steps(path.parent):
        step_batch(path.parent, steps)


def _write_synonyms(folder: Path) -> Synonyms:
    (folder / "synonyms.txt").write_text("dog, puppy\ncat\n", encoding="utf-8")
    return read_synonyms(folder / "synonyms.txt")


def _coco(path: Path) -> None:
    words = ObjectWords(synonyms=_write_synonyms(path.parent))
    coco_objects([path], [], words)


def _annotated(folder: Path) -> amber.Annotations:
    path = folder / "annotations.json"
    path.write_bytes(_ANNOTATIONS())
    return amber.read_annotations(path)


_ANNOTATIONS = _json(
    [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": "relation", "truth": "yes"},
    ]
)
_QUESTION = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"}


def _pope_responses(path: Path) -> None:
    questions = path.with_name("questions.json")
    questions.write_bytes(_lines(_QUESTION)())
    pope.read_responses(path, pope.read_questions(questions))


def _override(path: Path) -> None:
    text = path.read_bytes().decode(errors="surrogateescape")
    with contextlib.suppress(ConfigError):
        config.load(RunConfig, SHIPPED, [f"{text[:5]}={text}"])
    config.load(RunConfig, SHIPPED, [f"objective={text}"])


_MANIFEST = {
    "model": "base",
    "prompt": "a",
    "prompt_id": "a",
    "seed": 0,
    "file": "images/a.png",
    "sha256": "x",
    "fingerprint": "f",
    "sampler": {"steps": 3},
}
_COMPARISON = {
    "model": "a",
    "baseline": "b",
    "scorer": "s",
    "items": 4,
    "prompts": 2,
    "win_rate": 0.5,
    "win_rate_interval": {"low": 0.4, "high": 0.6},
    "win_rate_ties_half": None,
    "mean_difference": 1.5,
    "mean_difference_interval": None,
    "confidence": 0.95,
}
_COLUMN = {"image": "x", "prompt": "a", "fingerprint": "f", "score": 1.5}
_PAIR = {"prompt": "a dog", "chosen": "a.png", "rejected": "b.png"}
_LABELLED = {"caption": "a", "image1": "a.png", "image2": "b.png", "label1": 1, "label2": 0}
_RESPONSE = {
    "image": "a.png",
    "prompt": [{"role": "user", "content": "What is there?"}],
    "chosen": "A dog.",
    "rejected": "A cat.",
}
_OPA = {"0": {"copied_content": "A cat.", "rewritten_content": "A dog.", "score": 2}}

_GENEVAL = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ],
    "exclude": [{"class": "dog", "count": 2}],
    "prompt": "a cat left of a red dog",
}

READERS: dict[str, Reader] = {
    "config file": Reader(
        "run.yaml", SHIPPED.read_bytes, lambda path: config.load(RunConfig, path)
    ),
    "override": Reader("value", _text("{kind: dpo, beta: 5000}"), _override),
    "prompts txt": Reader("p.txt", _text("a\nb c\n"), read_prompts),
    "prompts csv": Reader("p.csv", _text('id,prompt\n1,"a, b"\n2,c\n'), read_prompts),
    "prompts tsv": Reader("p.tsv", _text("id\tcaption\n1\ta\n"), read_prompts),
    "prompts json": Reader("p.json", _json([{"prompt": "a"}, {"prompt": "b"}]), read_prompts),
    "prompts jsonl": Reader("p.jsonl", _lines({"text": "a"}, {"text": "b"}), read_prompts),
    "prompts geneval": Reader("g.jsonl", _lines(_GENEVAL), read_prompts),
    "geneval metadata": Reader("g.jsonl", _lines(_GENEVAL, _GENEVAL), read_requirements),
    "diversity": Reader(
        "a.diversity.json",
        _json({"vendi_score": {"base": 1.5}}),
        lambda path: read_diversity(path.with_name("a.jsonl")),
    ),
    "manifest": Reader(
        "manifest.jsonl", _lines(_MANIFEST, _MANIFEST), lambda path: read_manifest(path.parent)
    ),
    "score column": Reader("scores/s.jsonl", _lines(_COLUMN, _COLUMN), read_column),
    "caption": Reader(
        "a.txt", _text("a caption"), lambda path: find_images(path.parent), _write_images
    ),
    "template": Reader(
        "t.txt",
        _text("Rate {response} to {question}."),
        lambda path: fill(read_template(path, ""), question="q", response="a"),
    ),
    "pope questions": Reader("q.json", _lines(_QUESTION), pope.read_questions),
    "pope responses": Reader(
        "a.json", _lines({"question_id": 1, "answer": "yes"}), _pope_responses
    ),
    "chair captions": Reader(
        "c.json", _json([{"image_id": 1, "caption": "A dog."}]), chair.read_captions
    ),
    "chair synonyms": Reader("s.txt", _text("dog, puppy\ncat\n"), read_synonyms),
    "chair objects": Reader(
        "o.json",
        _json({"1": ["dog"], "2": []}),
        lambda path: read_image_objects(path, _write_synonyms(path.parent)),
    ),
    "coco instances": Reader(
        "i.json",
        _json(
            {
                "categories": [{"id": 1, "name": "dog"}],
                "annotations": [{"image_id": 5, "category_id": 1}],
                "images": [{"id": 5, "file_name": "5.jpg"}],
            }
        ),
        _coco,
    ),
    "amber annotations": Reader("a.json", _ANNOTATIONS, amber.read_annotations),
    "amber relations": Reader(
        "r.json",
        _json({"dog": ["puppy"], "cat": []}),
        lambda path: amber.read_relations(path, _annotated(path.parent)),
    ),
    "amber responses": Reader(
        "r.json",
        _json([{"id": 1, "response": "A dog."}, {"id": 2, "response": "Yes"}]),
        lambda path: amber.read_responses(path, _annotated(path.parent)),
    ),
    "amber queries": Reader(
        "q.json",
        _json([{"id": 1, "image": "a.jpg", "query": "Describe it."}]),
        lambda path: amber.read_queries([path]),
    ),
    "mmhal items": Reader(
        "m.json",
        _json([{"image_content": ["dog"], "question": "q", "gt_answer": "g", "model_answer": "m"}]),
        lambda path: mmhal.read_items(path, None),
    ),
    "judge's verdicts": Reader(
        "v.jsonl",
        _lines({"item": "1", "judge": "j", "key": "k", "reply": "4"}),
        lambda path: verdicts(Repeating(), {"1": "p"}, str, saves=path, attempts=1),
    ),
    "judge's list": Reader(
        "r.txt",
        _text('Objects:\n["dog", "cat"]'),
        lambda path: object_halbench.parse_objects(path.read_bytes().decode(errors="replace")),
        allowed=(ValueError,),
    ),
    "judge's correction": Reader(
        "r.txt",
        _text('{"0": {"rewritten_content": "A dog.", "score": 1}, "Added": {}}'),
        lambda path: parse_correction(path.read_bytes().decode(errors="replace")),
        allowed=(ValueError,),
    ),
    "corrections": Reader(
        "c.jsonl", _lines({"id": "a", "revised": "A dog.", "sample": 0}), read_corrections
    ),
    "scores of samples": Reader(
        "s.jsonl", _lines({"id": "a", "score": 1.5, "sample": 1}), read_scores
    ),
    "journal": Reader(
        "made.jsonl",
        _lines({"id": "a", "made_by": _digest({}), "made": {"chosen": "c"}}),
        lambda path: Journal(path.parent, {}),
    ),
    "results": Reader(
        "compare.json",
        _json({"comparisons": [_COMPARISON]}),
        read_evaluations,
    ),
    "pairs jsonl": Reader("p.jsonl", _lines(_PAIR, _PAIR), _pairs, _write_images),
    "pairs labelled": Reader("p.jsonl", _lines(_LABELLED, _LABELLED), _pairs, _write_images),
    "pairs tar": Reader("p.tar", _tar, _pairs),
    "pairs parquet": Reader("p.parquet", _parquet, lambda path: _pairs(path, streaming=True)),
    "responses jsonl": Reader("r.jsonl", _lines(_RESPONSE, _RESPONSE), _responses, _write_images),
    "responses json": Reader("r.json", _json([_RESPONSE, _RESPONSE]), _responses, _write_images),
    "RLHF-V's text": Reader(
        "t.json",
        _json({"question": "q", "chosen": "c", "rejected": "r"}),
        _mapped(RLHFV(), "text"),
        allowed=(UnusableRowError,),
    ),
    "OPA-DPO's report": Reader(
        "t.json",
        _json(_OPA),
        _mapped(
            OPADPO(),
            "AI_json_report",
            queries="What?",
            standard_response="A dog.",
            original_generate_response="A cat.",
            AI_pseudo_response="A dog.",
        ),
        allowed=(UnusableRowError,),
    ),
    **{
        f"image {kind}": Reader(
            f"a.{kind}",
            lambda kind=kind: _image(kind),  # type: ignore[misc]
            lambda path: decode(path, max_pixels=1 << 20),
            allowed=(BadImageError,),
        )
        for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")
    },
    "checkpoint's state": Reader(
        "checkpoint-1/state.json", _state, lambda path: load_checkpoint(path.parent), _checkpoint
    ),
    "metrics": Reader(
        "metrics.jsonl",
        _lines({"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}),
        lambda path: JsonLines(path).truncate_after(1),
    ),
    "skipped": Reader(
        "skipped.jsonl",
        _lines({"sample_id": "a", "reason": "corrupt image", "detail": "", "side": None}),
        SkipLog,
    ),
    "reference index": Reader(
        "index.json", _index, _cached, lambda folder: _write(folder / _SHARD, _shard())
    ),
    "reference values": Reader(
        _SHARD, _shard, _cached, lambda folder: _write(folder / "index.json", _index())
    ),
    "shard": Reader(_SHARD, lambda: _file_of(_computed, _SHARD), _cached, _computed),
    "index of shards": Reader(
        "index.json", lambda: _file_of(_computed, "index.json"), _cached, _computed
    ),
    "record of a round": Reader(
        "round.json",
        _json({"round": 0, "policy": "p", "harvest": {"micro_batches": 1, "summary": {"x": 0.5}}}),
        lambda path: _read(_Round, path),
    ),
    "responses of a model": Reader(
        "a.jsonl",
        _lines(
            {
                "question_id": "1",
                "image": "a.png",
                "question": "q",
                "answer": "a",
                "asked": "x",
                "made_by": "m",
            }
        ),
        lambda path: _kept(path, "m"),
    ),
    "pickled weights": Reader("w.bin", _pickled, read_state),
    "groups": Reader("groups.jsonl", _lines(_GROUP), lambda path: read_groups(path.parent)),
    "trajectories": Reader("t.safetensors", _trajectories, _origins, _list_group),
    "preferences": Reader(
        "p.jsonl",
        _lines({"group": "a", "ranking": [0, [1, 2]]}, {"group": "b", "good": [0], "bad": [1]}),
        lambda path: read_preferences(path, {"a": 3, "b": 2}),
    ),
    "steps": Reader(
        "steps.jsonl",
        _lines(_STEP),
        _steps,
        lambda folder: _write(folder / "latents.safetensors", _tensors(latents=(3, 2))),
    ),
    "latents": Reader(
        "latents.safetensors",
        lambda: _tensors(latents=(3, 2)),
        _steps,
        lambda folder: _write(folder / "steps.jsonl", _lines(_STEP)()),
    ),
    "tensors": Reader("t.safetensors", lambda: _tensors({"a": "b"}, x=(2, 3), y=()), read_tensors),
    "weights of a scorer": Reader("w.safetensors", lambda: _tensors(x=(2,)), read_state),
    "adapter": Reader(
        "a.safetensors",
        lambda: _tensors(
            {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4}'},
            **{"unet.x.lora_A.weight": (2, 3), "unet.x.lora_B.weight": (3, 2)},
        ),
        lambda path: read_adapter(path, component="unet"),
    ),
    "adapter's settings": Reader(
        "adapter_config.json",
        _json({"r": 2, "lora_alpha": 4, "use_rslora": True}),
        lambda path: read_adapter(path.with_name("a.safetensors"), component=PEFT_PREFIX),
        lambda folder: _write(
            folder / "a.safetensors",
            _tensors(**{f"{PEFT_PREFIX}.x.lora_A.weight": (2, 3)}),
        ),
    ),
    "model index": Reader(
        "model_index.json",
        _json({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}),
        lambda path: locate(str(path.parent)).read_json(path.name),
    ),
}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def prepared(reader: Reader, folder: Path) -> Reader:
    """The reader, with what lies next to its file written, in a folder of its own."""
    (folder / reader.file).parent.mkdir(parents=True, exist_ok=True)
    reader.next_to(folder)
    return replace(reader, good=lru_cache(reader.good))


def cases(reader: Reader, seed: int) -> Iterator[bytes]:
    """Damaged files without end, the same for the same seed."""
    good = reader.good()
    for number in range(1 << 62):
        yield damaged(good, random.Random(f"{seed}/{reader.file}/{number}"))
