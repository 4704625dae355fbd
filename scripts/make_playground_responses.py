"""Make the playground's preferences between responses from the tiny LLaVA's own samples.

    python scripts/make_playground_responses.py --out assets/playground/responses
    python scripts/make_playground_responses.py --repeats --out assets/playground/repeats

Every scene is described a few times at temperature 1; the first description that names an object
which is not there is the rejected response, whatever else it says; with --repeats also the first
one that names an object twice. The ground truth writes two better ones: the chosen response, which
a truthful annotator gives, and the revised one, which is the rejected one with as little as
possible changed. One file holds the columns of several published forms side by side, made of the
same samples, and `responses.kind` says which are read:

    trl         image, prompt, chosen, rejected
    rlhf_v      image, text: the revised response against the rejected one
    mask_dpo    image, prompt, chosen_item, rejected_item: sentences with labels
    opa_dpo     image, queries, three responses, AI_json_report: sentences with scores
    re_align    image, retrieved_image, prompt, chosen, rejected: the retrieved image is the scene
                of another row that the model's own vision tower finds most alike
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain_playground_llava import pixel_values, seen_by

from diffalign.models.vlm.config import VLM
from diffalign.models.vlm.model import VisionLanguageModel
from diffalign.playground.corrections import (
    CheckedSentence,
    check_sentences,
    hallucinates,
    revised,
)
from diffalign.playground.models import playground_llava_path
from diffalign.playground.multi_object_scenes import (
    description,
    kinds_in,
    sample_multi_object_scene,
    sentences_of,
    truthful_order,
)
from diffalign.playground.questions import DESCRIBE
from diffalign.playground.scenes import Scene, render

_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_MESSAGES = pa.list_(
    pa.struct(
        {
            "role": pa.string(),
            "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()})),
        }
    )
)
_SENTENCES = pa.struct({"sents": pa.list_(pa.string()), "type": pa.list_(pa.string())})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": _IMAGE,
        "retrieved_image": _IMAGE,
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "text": pa.string(),
        "chosen_item": _SENTENCES,
        "rejected_item": _SENTENCES,
        "queries": pa.string(),
        "standard_response": pa.string(),
        "original_generate_response": pa.string(),
        "AI_pseudo_response": pa.string(),
        "AI_json_report": pa.string(),
    }
)

SCORES = {"none": 4, "attribute": 2, "absent": 1, "repeated": 2}
"""OPA-DPO's score of a sentence, from 1 to 4."""
ERRORS = {
    "none": "correct",
    "attribute": "image_recognition_error",
    "absent": "image_recognition_error",
    "repeated": "image_recognition_error",
}
"""OPA-DPO's names of mistakes."""


@dataclass(frozen=True)
class Example:
    """A scene and what the model said of it."""

    scene: Scene
    sample: str
    sentences: list[CheckedSentence]

    @property
    def truth(self) -> str:
        return description(truthful_order(kinds_in(self.scene)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet")
    parser.add_argument("--model", type=Path, help="folder of the model; default: the shipped one")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=3, help="descriptions sampled of each scene")
    parser.add_argument(
        "--repeats", action="store_true", help="reject descriptions that name an object twice, too"
    )
    parser.add_argument("--seed", type=int, default=30_000_001, help="of scenes and samples")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    model = VLM(path=str(args.model or playground_llava_path())).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    examples = []
    for example in mistaken(model, samples=args.samples, seed=args.seed, repeats=args.repeats):
        examples.append(example)
        if len(examples) == args.rows:
            break
    neighbours = most_alike(model, [example.scene for example in examples])
    images = [as_stored(example.scene) for example in examples]
    rows = [
        row_of(example, f"{args.seed}-{i}", images[i], images[neighbours[i]])
        for i, example in enumerate(examples)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), target, compression="zstd")
    (args.out / "README.md").write_text(card(examples, args), encoding="utf-8")
    print(f"wrote {target}: {len(rows)} rows, {target.stat().st_size / 1e6:.1f} MB")
    print(summary(examples))


def mistaken(
    model: VisionLanguageModel, *, samples: int, seed: int, repeats: bool, at_once: int = 64
) -> Iterator[Example]:
    """Scenes without end, of those the ones that the model describes with a mistake.

    A description that is wrong throughout or is none is passed over, and without `repeats` one that
    names an object twice: there is nothing in it to keep, or no telling what it meant.
    """
    content = [{"type": "image"}, {"type": "text", "text": DESCRIBE}]
    prompt = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    start = 0
    while True:
        scenes = [sample_multi_object_scene((seed, start + i)) for i in range(at_once)]
        sampled = [
            model.generate(
                [prompt] * at_once,
                [[stored_image(scene)] for scene in scenes],
                max_new_tokens=64,
                temperature=1.0,
                seed=seed + start * samples + i,
            )
            for i in range(samples)
        ]
        for scene, texts in zip(scenes, zip(*sampled, strict=True), strict=True):
            example = first_mistaken(scene, texts, repeats=repeats)
            if example is not None:
                yield example
        start += at_once
        print(f"{start} scenes described", flush=True)


def first_mistaken(scene: Scene, texts: Sequence[str], *, repeats: bool) -> Example | None:
    """The first description that makes a mistake which can be fixed."""
    for text in texts:
        sentences = check_sentences(text, scene, repeats=repeats)
        if sentences and hallucinates(sentences) and revised(sentences):
            return Example(scene, text, sentences)
    return None


@torch.no_grad()
def most_alike(model: VisionLanguageModel, scenes: Sequence[Scene]) -> list[int]:
    """For each scene the one that shows other kinds and is nearest to the vision tower.

    Nearest by the cosine of mean features, from which the mean over all scenes is taken away.
    """
    features = seen_by(model.network.model, pixel_values(scenes)).mean(dim=1)
    directions = F.normalize(features - features.mean(dim=0), dim=-1)
    cosines = directions @ directions.T
    shown = [frozenset(kinds_in(scene)) for scene in scenes]
    for i, kinds in enumerate(shown):
        cosines[i, [j for j, others in enumerate(shown) if others == kinds]] = -1.0
    return cosines.argmax(dim=1).tolist()


def stored_image(scene: Scene) -> Image.Image:
    """The image as the file holds it: what the model describes is what it is trained on."""
    return Image.open(io.BytesIO(as_stored(scene))).convert("RGB")


def as_stored(scene: Scene) -> bytes:
    """PNG of 64 colours, which is half as large as all of them and looks the same."""
    buffer = io.BytesIO()
    render(scene).quantize(64).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def row_of(example: Example, name: str, image: bytes, retrieved: bytes) -> dict[str, object]:
    fixed = revised(example.sentences)
    return {
        "id": name,
        "image": {"bytes": image, "path": f"{name}.png"},
        "retrieved_image": {"bytes": retrieved, "path": None},
        "prompt": message("user", None, DESCRIBE),
        "chosen": message("assistant", example.truth),
        "rejected": message("assistant", example.sample),
        "text": json.dumps({"question": DESCRIBE, "chosen": fixed, "rejected": example.sample}),
        "chosen_item": labelled([(text, False) for text in sentences_of(example.truth)]),
        "rejected_item": labelled([(s.text, s.fault != "none") for s in example.sentences]),
        "queries": f"USER: <image>\n{DESCRIBE} ASSISTANT:",
        "standard_response": example.truth,
        "original_generate_response": example.sample,
        "AI_pseudo_response": fixed,
        "AI_json_report": json.dumps(report(example.sentences)),
    }


def message(role: str, *texts: str | None) -> list[dict[str, object]]:
    """One message; None represents the image."""
    blocks = [
        {"type": "image", "text": None} if text is None else {"type": "text", "text": text}
        for text in texts
    ]
    return [{"role": role, "content": blocks}]


def labelled(sentences: Sequence[tuple[str, bool]]) -> dict[str, list[str]]:
    """Mask-DPO's sentences and types."""
    return {
        "sents": [text for text, _ in sentences],
        "type": ["hallucination" if wrong else "no_hallucination" for _, wrong in sentences],
    }


def report(sentences: Sequence[CheckedSentence]) -> dict[str, dict[str, object]]:
    """OPA-DPO's report."""
    return {
        str(i): {
            "copied_content": item.text,
            "score": SCORES[item.fault],
            "error_type": ERRORS[item.fault],
            "rewritten_content": item.corrected,
        }
        for i, item in enumerate(sentences)
    }


def summary(examples: Sequence[Example]) -> str:
    """What a reader of results must know: kinds of mistakes, and the lengths of all sides."""
    sentences = [item for example in examples for item in example.sentences]
    lengths = {
        "chosen": [example.truth for example in examples],
        "revised": [revised(example.sentences) for example in examples],
        "rejected": [example.sample for example in examples],
    }
    faults = {name: sum(item.fault == name for item in sentences) for name in SCORES}
    again = f", {faults['repeated']} an object that was named before" if faults["repeated"] else ""
    words = ", ".join(
        f"{name} {np.mean([len(text.split()) for text in texts]):.1f}"
        for name, texts in lengths.items()
    )
    return (
        f"Sentences of rejected responses: {faults['none']} right, {faults['absent']} name an "
        f"absent object, {faults['attribute']} a wrong colour or shape{again}. Mean length in "
        f"words: {words}."
    )


def card(examples: Sequence[Example], args: argparse.Namespace) -> str:
    return f"""---
license: apache-2.0
---
# Preferences between responses

{len(examples)} descriptions of playground scenes by the tiny LLaVA itself, sampled at temperature
1, each with at least one mistake (rejected); the truth (chosen); and the rejected one with as
little as possible changed (revised).

{summary(examples)}

The columns are those of several published forms side by side; `responses.kind` chooses `trl`,
`rlhf_v`, `mask_dpo`, `opa_dpo` or `re_align`. Made by

    python scripts/make_playground_responses.py{" --repeats" if args.repeats else ""} \\
      --out assets/playground/{args.out.name} --rows {args.rows}
"""


if __name__ == "__main__":
    main()
