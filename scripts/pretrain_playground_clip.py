"""Pretrain the playground's tiny CLIP from nothing, then fit it to the playground's preferences.

    python scripts/pretrain_playground_clip.py --out assets/playground/clip

Two stages. Contrastive training on rendered scenes with true captions; next to the other captions
of a batch, every image meets a misreading of its own, or the tower would learn which words occur
and not which shape has which colour. Then a Bradley-Terry fit to pairs of the finished SDXL's own
samples, as PickScore was made from CLIP. What results scores clean images. Same seed, same
machine: same weights.

With `--measure` it is compared with the oracle on pairs that it never saw, such as those of
`make_playground_preferences.py --held-out`.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain_playground import fit, misread, shuffled_batches, to_tensor
from torch import Tensor
from transformers import CLIPModel

from diffalign.models.preference.clip_loading import (
    cosine,
    image_features,
    pixel_values,
    read_clip,
    text_features,
    tokenize,
)
from diffalign.playground.models import (
    PROMPT_TOKENS,
    build_clip,
    build_tokenizer,
    playground_preferences_path,
    save_clip,
)
from diffalign.playground.scenes import Scene, describe, render, sample_scene

TOKENIZER = build_tokenizer(pad_token="<|endoftext|>")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="folder of a CLIP to fit, instead of the first stage")
    parser.add_argument("--scenes", type=int, default=8192, help="rendered images to learn from")
    parser.add_argument("--contrastive-steps", type=int, default=2500, help="steps of 64 scenes")
    parser.add_argument("--preference-steps", type=int, default=200, help="steps of 32 pairs")
    parser.add_argument("--preferences", type=Path, help="default: the shipped pairs")
    parser.add_argument("--measure", type=Path, help="folder of unseen pairs to measure on")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    if args.start:
        clip = read_clip(args.start)
    else:
        scenes = [sample_scene(np.random.default_rng((args.seed, i))) for i in range(args.scenes)]
        clip = build_clip(args.seed)
        train_contrastively(clip, scenes, steps=args.contrastive_steps, seed=args.seed)
    unseen = read_pairs(args.measure) if args.measure else None
    before = agreement(clip, unseen) if unseen else None
    pairs = read_pairs(args.preferences or playground_preferences_path())
    fit_preferences(clip, pairs, steps=args.preference_steps, seed=args.seed)
    after = agreement(clip, unseen) if unseen else None
    minutes = (time.monotonic() - started) / 60
    save_clip(clip, args.out)
    card = model_card(args, minutes, before=before, after=after)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {args.out} after {minutes:.1f} minutes: {before} before pairs, {after} after")


def train_contrastively(clip: CLIPModel, scenes: list[Scene], *, steps: int, seed: int) -> None:
    """Each image finds its caption among all others and one misreading an image; and back."""
    pixels = pixel_values(torch.stack([to_tensor(render(scene)) for scene in scenes]))
    kinds = [tuple(item.kind for item in scene.objects) for scene in scenes]
    rng = np.random.default_rng(seed)

    def loss_on(rows: np.ndarray) -> Tensor:
        captions = [describe(kinds[row]) for row in rows]
        misreadings = [describe(misread(kinds[row], rng)) for row in rows]
        texts = list(dict.fromkeys([*captions, *misreadings]))
        own = torch.tensor([texts.index(text) for text in captions])
        images = F.normalize(image_features(clip, pixels[rows]), dim=-1)
        words = F.normalize(text_features(clip, tokens_of(texts)), dim=-1)
        logits = clip.logit_scale.exp() * images @ words.T  # [images, texts]
        same = (own[:, None] == own[None, :]).float()
        back = F.cross_entropy(logits[:, own].T, same / same.sum(dim=1, keepdim=True))
        return (F.cross_entropy(logits, own) + back) / 2

    batches = shuffled_batches(len(scenes), 64, rng)
    fit("contrastive", list(clip.parameters()), loss_on, batches, steps=steps, lr=1e-3)


@dataclass(frozen=True)
class Pairs:
    """Two images a prompt."""

    prompts: list[str]
    first: Tensor
    """Pixel values as the tower takes them, [n, 3, 64, 64]."""
    second: Tensor
    preference: Tensor
    """1 where the first is preferred, 0 where the second is, one half for a tie; [n]."""

    def __len__(self) -> int:
        return len(self.prompts)


def read_pairs(folder: Path) -> Pairs:
    table = pq.read_table(sorted(folder.glob("*.parquet"))).to_pydict()
    return Pairs(
        prompts=table["caption"],
        first=stack_images(table["jpg_0"]),
        second=stack_images(table["jpg_1"]),
        preference=torch.tensor(table["label_0"], dtype=torch.float32),
    )


def stack_images(files: list[bytes]) -> Tensor:
    arrays = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    return pixel_values(images)


def fit_preferences(clip: CLIPModel, pairs: Pairs, *, steps: int, seed: int) -> None:
    """Cross-entropy of the two scores of a pair against the oracle's label; ties count."""

    def loss_on(rows: np.ndarray) -> Tensor:
        margin = margins(clip, pairs, rows)
        return F.binary_cross_entropy_with_logits(margin, pairs.preference[rows])

    batches = shuffled_batches(len(pairs), 32, np.random.default_rng(seed))
    fit("preferences", list(clip.parameters()), loss_on, batches, steps=steps, lr=3e-4)


def margins(clip: CLIPModel, pairs: Pairs, rows: np.ndarray) -> Tensor:
    """Score of the first image minus that of the second."""
    images = image_features(clip, torch.cat([pairs.first[rows], pairs.second[rows]]))
    texts = text_features(clip, tokens_of([pairs.prompts[row] for row in rows])).repeat(2, 1)
    first, second = (clip.logit_scale.exp() * cosine(images, texts)).chunk(2)
    return first - second


def tokens_of(texts: list[str]) -> Tensor:
    return tokenize(TOKENIZER, texts, length=PROMPT_TOKENS)


@torch.no_grad()
def agreement(clip: CLIPModel, pairs: Pairs) -> float:
    """Share of the decided pairs in which the better score is the oracle's choice."""
    decided = np.flatnonzero(pairs.preference.numpy() != 0.5)
    first_wins = margins(clip, pairs, decided) > 0
    return (first_wins == (pairs.preference[decided] == 1)).float().mean().item()


def model_card(
    args: argparse.Namespace, minutes: float, *, before: float | None, after: float | None
) -> str:
    figures = ""
    if before is not None and after is not None:
        figures = (
            f"It agrees with the oracle in {100 * after:.1f} % of decided pairs of held-out\n"
            f"prompts, in {100 * before:.1f} % before preferences were fitted.\n"
        )
    return f"""---
license: apache-2.0
library_name: transformers
---
# The playground's tiny CLIP

CLIP in 0.6 M parameters for whole images of 64x64 pixels, fitted to the playground's preference
pairs: what PickScore is to Stable Diffusion. `CLIPModel.from_pretrained` opens this folder.

{figures}
Made in {minutes:.0f} minutes on the CPU with torch {torch.__version__} by

    python {shlex.join(sys.argv)}
"""


if __name__ == "__main__":
    main()
