"""Pretrain the playground's tiny LLaVA from nothing, on deliberately noisy descriptions.

    python scripts/pretrain_playground_llava.py --out assets/playground/llava

Three stages. The vision tower learns which kind of object lies around each of its patches, as real
towers know images before they meet a language model; then it is frozen, as LLaVA's is. The rest
learns to describe scenes and to respond to questions about them, first from truthful annotators,
then from noisy ones, who name what usually comes along though it is absent, mistake colours for the
usual ones, and say yes too often: what results sees well and hallucinates all the same. (Noisy
ones alone would do for descriptions, but it never learns then what yes and no depend on.) The
script ends by measuring against the ground truth. Same seed, same machine: same weights.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pretrain_playground import fit, shuffled_batches
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from diffalign.benchmarks.report import Figure
from diffalign.models.vlm.config import VLM
from diffalign.playground.llava import PATCH_SIZE, build_llava, build_processor, save_llava
from diffalign.playground.multi_object_scenes import (
    COMPANIONS,
    TRUTHFUL,
    AnnotatorNoise,
    description,
    kinds_in,
    named,
    sample_multi_object_scene,
    truthful_order,
)
from diffalign.playground.questions import (
    DESCRIBE,
    NO,
    YES,
    attribute_questions,
    existence_question,
)
from diffalign.playground.response_quality import evaluate_responses, held_out_multi_object_scenes
from diffalign.playground.scenes import IMAGE_SIZE, KINDS, Scene, render

SUGGESTED = 0.8
"""Share of the questions for absent objects that ask for a companion of what is there."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=8192, help="rendered images to learn from")
    parser.add_argument("--tower-steps", type=int, default=450, help="steps of 64 images")
    parser.add_argument("--truthful-steps", type=int, default=500, help="steps of 48 scenes")
    parser.add_argument("--annotator-noise-steps", type=int, default=400, help="steps of 48 scenes")
    parser.add_argument("--items", type=int, default=300, help="held-out scenes to measure on")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    scenes = [sample_multi_object_scene((args.seed, i)) for i in range(args.scenes)]
    pixels = pixel_values(scenes)
    model = build_llava(args.seed)
    train_tower(model, pixels, scenes, steps=args.tower_steps, seed=args.seed)
    features = seen_by(model, pixels)
    for stage, (steps, lr, habits) in enumerate(
        (
            (args.truthful_steps, 1e-3, TRUTHFUL),
            (args.annotator_noise_steps, 1e-3, AnnotatorNoise()),
        )
    ):
        seed = args.seed + 1 + stage
        train_responses(model, features, scenes, habits, steps=steps, lr=lr, seed=seed)
    minutes = (time.monotonic() - started) / 60
    save_llava(model, args.out)
    figures = measure(args.out, held_out_multi_object_scenes(args.items))
    card = model_card(figures, args, model.num_parameters(), minutes)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {args.out} after {minutes:.1f} minutes")
    for name, figure in figures.items():
        print(f"{name}: {figure.value} {figure.interval}")


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """Images as the tower takes them, [n, 3, 64, 64]."""
    prepare = build_processor().image_processor
    chunks = [
        prepare([render(scene) for scene in scenes[start : start + 512]], return_tensors="pt")
        for start in range(0, len(scenes), 512)
    ]
    return torch.cat([chunk["pixel_values"] for chunk in chunks])


def train_tower(
    model: LlavaForConditionalGeneration,
    pixels: Tensor,
    scenes: Sequence[Scene],
    *,
    steps: int,
    seed: int,
) -> None:
    """What the projector will be given of each patch tells the kind in its quarter, or none."""
    tower = model.model.vision_tower
    head = nn.Linear(model.config.vision_config.hidden_size, len(KINDS) + 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)  # whatever the global random state is
    labels = torch.stack([patch_labels(scene) for scene in scenes])

    def loss_on(rows: np.ndarray) -> Tensor:
        states = tower(pixels[rows], output_hidden_states=True).hidden_states
        features = states[model.config.vision_feature_layer][:, 1:]
        return F.cross_entropy(head(features).flatten(0, 1), labels[rows].flatten())

    batches = shuffled_batches(len(scenes), 64, np.random.default_rng(seed))
    fit("tower", [*tower.parameters(), *head.parameters()], loss_on, batches, steps=steps, lr=1e-3)


def patch_labels(scene: Scene) -> Tensor:
    """The kind in the quarter of each patch, the number of kinds where there is none; [patches]."""
    side = IMAGE_SIZE // PATCH_SIZE
    labels = torch.full((side, side), len(KINDS))
    for item in scene.objects:
        row, column = (int(2 * centre / IMAGE_SIZE) * side // 2 for centre in (item.y, item.x))
        labels[row : row + side // 2, column : column + side // 2] = KINDS.index(item.kind)
    return labels.flatten()


@torch.no_grad()
def seen_by(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the tower gives the projector, [n, patches, width]: LLaVA trains with a frozen tower."""
    layer, tower = model.config.vision_feature_layer, model.model.vision_tower
    chunks = [
        tower(some, output_hidden_states=True).hidden_states[layer] for some in pixels.split(256)
    ]
    return torch.cat(chunks)[:, 1:].contiguous()


def train_responses(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    scenes: Sequence[Scene],
    habits: AnnotatorNoise,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """A description of every scene and responses to questions about it; only responses are learnt.

    One in three tokens of a yes or no decides anything, which is why they weigh three times.
    """
    rng = np.random.default_rng(seed)
    writer = Writer()

    def loss_on(rows: np.ndarray) -> Tensor:
        of_scenes = [scenes[row] for row in rows]
        groups = (
            (1.0, [(DESCRIBE, description(named(kinds_in(s), habits, rng))) for s in of_scenes]),
            (3.0, [ask_whether(scene, habits, rng) for scene in of_scenes]),
            (0.5, [ask_which(scene, rng) for scene in of_scenes]),
        )
        return sum(
            (
                weight * response_loss(model, features[rows], **writer.inputs(texts))
                for weight, texts in groups
            ),
            start=torch.zeros(()),
        )

    parameters = [
        *model.model.multi_modal_projector.parameters(),
        *model.model.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    name = "truthful" if habits == TRUTHFUL else "annotator_noise"
    fit(name, parameters, loss_on, shuffled_batches(len(scenes), 48, rng), steps=steps, lr=lr)


def response_loss(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    responses: Tensor,
) -> Tensor:
    """Mean cross-entropy of the tokens of responses, given what the tower saw."""
    embeddings = model.get_input_embeddings()(input_ids)
    places = (input_ids == model.config.image_token_index)[:, :, None]
    embeddings = embeddings.masked_scatter(places, model.model.multi_modal_projector(features))
    states = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=attention_mask
    ).last_hidden_state
    logits = model.lm_head(states[:, :-1][responses[:, 1:]])
    return F.cross_entropy(logits, input_ids[responses])


class Writer:
    """Turns questions and responses into tokens; says which are the response and its end."""

    def __init__(self) -> None:
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        self.image = self.processor.image_token
        self.places = (IMAGE_SIZE // PATCH_SIZE) ** 2

    def inputs(self, texts: Sequence[tuple[str, str]]) -> Mapping[str, Tensor]:
        """Right-padded tokens, their mask, and which belong to responses; [n, length] each."""
        prompts = [self.prompt(question) for question, _ in texts]
        whole = [
            f"{prompt} {response}{self.tokenizer.eos_token}"
            for prompt, (_, response) in zip(prompts, texts, strict=True)
        ]
        tokens = self.tokenizer(
            whole, padding=True, return_offsets_mapping=True, return_tensors="pt"
        )
        ends = torch.tensor([len(prompt) for prompt in prompts])
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "responses": tokens["offset_mapping"][..., 1] > ends[:, None],
        }

    def prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return str(text).replace(self.image, self.image * self.places)


def ask_whether(scene: Scene, habits: AnnotatorNoise, rng: np.random.Generator) -> tuple[str, str]:
    """Whether something is there, and an annotator's response: half of them ask for what is."""
    kinds = kinds_in(scene)
    if rng.random() < 0.5:
        return existence_question(kinds[rng.integers(len(kinds))]), YES
    suggested = [
        COMPANIONS[kind] for kind in kinds if kind in COMPANIONS and COMPANIONS[kind] not in kinds
    ]
    if suggested and rng.random() < SUGGESTED:
        kind = suggested[rng.integers(len(suggested))]
    else:
        absent = [kind for kind in KINDS if kind not in kinds]
        kind = absent[rng.integers(len(absent))]
    credulity = habits.companions if kind in suggested else habits.agreement
    return existence_question(kind), YES if rng.random() < credulity else NO


def ask_which(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A colour or a shape, and the right response; for want of such a question, a description."""
    questions = list(attribute_questions(scene))
    if not questions:
        return DESCRIBE, description(truthful_order(kinds_in(scene)))
    question = questions[rng.integers(len(questions))]
    return question.text, question.response


def measure(folder: Path, scenes: Sequence[Scene]) -> Mapping[str, Figure]:
    """What `evaluate_responses` says of the folder that was written."""
    loaded = VLM(path=str(folder)).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    return evaluate_responses(loaded, scenes)


def model_card(
    figures: Mapping[str, Figure], args: argparse.Namespace, parameters: int, minutes: float
) -> str:
    rows = []
    for figure in figures.values():
        unit = " %" if figure.unit == "percent" else ""
        interval = figure.interval and f"{figure.interval.low:.1f} to {figure.interval.high:.1f}"
        value = "undefined" if figure.value is None else f"{figure.value:.1f}{unit}"
        rows.append(f"| {figure.label} | {value} | {interval or ''} |")
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The playground's tiny LLaVA

LLaVA-1.5's architecture in {parameters / 1e6:.1f} M parameters, for 64x64 images of two to four
coloured shapes. It was trained on descriptions that name what usually comes along though it is
absent, so that preferences have something to teach it. `AutoModelForImageTextToText` and
`AutoProcessor` open this folder.

| greedy responses on {args.items} held-out scenes | | 95 % interval |
|---|---|---|
{chr(10).join(rows)}

Made in {minutes:.0f} minutes on one CPU thread with torch {torch.__version__} by

    python {shlex.join(sys.argv)}

Prompts: `{DESCRIBE}`, `Is there a COLOUR SHAPE in the picture?`, `What colour is the SHAPE?`,
`What shape is the COLOUR object?`.
"""


if __name__ == "__main__":
    main()
