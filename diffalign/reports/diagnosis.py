"""The page of `diffalign diagnose`: which words training moved, and where the model looked.

The log-ratio of two models is a reward, and token by token it tells which words training made more
or less probable (Rafailov et al. 2024, From r to Q*, arXiv:2404.12358).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup as Html
from PIL import Image

from diffalign.imaging.image_files import data_uri
from diffalign.pages.environment import part
from diffalign.pages.parts import Section, Tile, page_of, paragraph, table, tiles

_SIDE = 224
"""Pixels of an image on the page."""
_LISTED = 12
"""Words of the table of those that moved most."""
END = "(end)"
"""What stands for tokens without text."""


@dataclass(frozen=True)
class Word:
    """A word of a response, with the space before it, and how probable two models find it."""

    text: str
    policy: float
    """Log-probability of its tokens under the trained model, in nats."""
    reference: float
    """Likewise under the one before it."""

    @property
    def log_ratio(self) -> float:
        """Above 0 where training made it more probable."""
        return self.policy - self.reference


@dataclass(frozen=True, kw_only=True)
class DiagnosedResponse:
    """A response of a pair."""

    name: str
    """Such as `chosen`."""
    words: Sequence[Word]
    looked_at: np.ndarray | None
    """Weights of patches, [rows, columns]; None where there are none."""

    @property
    def log_ratio(self) -> float:
        """Of the whole response, in nats."""
        return sum(word.log_ratio for word in self.words)


@dataclass(frozen=True, kw_only=True)
class DiagnosedPair:
    """The responses of one sample."""

    sample_id: str
    prompt: str
    image: Image.Image | None
    """The first one."""
    responses: Sequence[DiagnosedResponse]
    seen: Image.Image | None = None
    """What the model got of it, such as its middle, which `looked_at` is a map of; None for all of
    it."""


def token_texts(response: str, offsets: Sequence[Sequence[int]]) -> list[str]:
    """What each token has of a response, with the white space before it; nothing for its end.

    Args:
        response: its text.
        offsets: n of them, first character of each token and the one after its last.
    """
    texts, before = [], 0
    for start, end in offsets:
        texts.append(response[before:end] if end > start else "")
        before = max(before, end)
    return texts


def words_of(
    texts: Sequence[str], policy: Sequence[float], reference: Sequence[float]
) -> list[Word]:
    """Tokens put together to words; a token without text, such as the end, is a word of its own.

    Args:
        texts: of `token_texts`, n of them.
        policy, reference: log-probabilities, n each.
    """
    words: list[Word] = []
    for text, now, before in zip(texts, policy, reference, strict=True):
        goes_on = bool(words) and bool(text) and bool(words[-1].text) and not text[0].isspace()
        if goes_on:
            last = words.pop()
            words.append(Word(last.text + text, last.policy + now, last.reference + before))
        else:
            words.append(Word(text, now, before))
    return words


def diagnosis_page(title: str, pairs: Sequence[DiagnosedPair], *, lead: str = "") -> str:
    """The page as text: figures, words that moved, and every response word by word.

    Args:
        title: heading.
        pairs: at least one.
        lead: a sentence under the title.
    """
    scale = heat_scale(pairs)
    return page_of(
        title,
        Section("Figures", tiles(_tiles(pairs))),
        Section("Words that moved most", _moved(pairs), paragraph(_WORDS_EXPLAINED)),
        Section(
            "Responses word by word",
            paragraph(
                f"Green words became more probable by training, red ones less; the full colour is "
                f"{scale:.2g} nats. A word's figures show where the pointer rests on it."
            ),
            *(_card(pair, scale) for pair in pairs),
        ),
        lead=lead,
    )


_WORDS_EXPLAINED = (
    "Mean change of a word's log-probability over all places where it stands, in nats. Words that "
    "fall in chosen responses are what training takes away with the rejected ones."
)


def heat_scale(pairs: Sequence[DiagnosedPair]) -> float:
    """The log-ratio that gets the full colour: nineteen of twenty words have a smaller one."""
    sizes = [abs(w.log_ratio) for pair in pairs for r in pair.responses for w in r.words]
    return max(float(np.quantile(sizes, 0.95)) if sizes else 0.0, 1e-3)


def _tiles(pairs: Sequence[DiagnosedPair]) -> list[Tile]:
    by_name: dict[str, list[float]] = {}
    for pair in pairs:
        for response in pair.responses:
            by_name.setdefault(response.name, []).append(response.log_ratio)
    shown = []
    for name, ratios in by_name.items():
        fell = sum(ratio < 0 for ratio in ratios)
        shown.append(
            Tile(
                f"{name}: mean log-ratio, nats",
                f"{np.mean(ratios):+.2f}",
                f"{fell} of {len(ratios)} less probable than before",
            )
        )
    if {"chosen", "rejected"} <= by_name.keys():
        both = list(zip(by_name["chosen"], by_name["rejected"], strict=True))
        displaced = sum(rejected < chosen < 0 for chosen, rejected in both)
        shown.append(
            Tile(
                "pairs displaced",
                f"{displaced} of {len(both)}",
                "told apart, but the chosen response fell too",
            )
        )
    return shown


def _moved(pairs: Sequence[DiagnosedPair]) -> Html:
    found: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        for response in pair.responses:
            for word in response.words:
                key = (response.name, word.text.strip() or END)
                found.setdefault(key, []).append(word.log_ratio)
    means = sorted(
        ((name, text, float(np.mean(r)), len(r)) for (name, text), r in found.items()),
        key=lambda row: row[2],
    )
    half = _LISTED // 2
    shown = means if len(means) <= _LISTED else [*means[:half], *means[-half:]]
    return table(
        ("word", "in", "mean change", "times"),
        [(text, name, f"{mean:+.2f}", str(count)) for name, text, mean, count in shown],
    )


def _card(pair: DiagnosedPair, scale: float) -> Html:
    return part(
        "diagnosed_pair",
        pair.sample_id,
        pair.prompt,
        None if pair.image is None else data_uri(_enlarged(pair.image), side=_SIDE),
        [
            {
                "name": response.name,
                "log_ratio": f"{response.log_ratio:+.2f}",
                "looked": None
                if pair.image is None or response.looked_at is None
                else data_uri(heat_image(pair.seen or pair.image, response.looked_at), side=_SIDE),
                "words": [_shown(word, scale) for word in response.words],
            }
            for response in pair.responses
        ],
        of="diagnosis.html",
    )


def _shown(word: Word, scale: float) -> dict[str, str]:
    text = word.text if word.text.strip() else f" {END}"
    return {
        "before": text[: len(text) - len(text.lstrip())],
        "text": text.lstrip(),
        "kind": "rise" if word.log_ratio >= 0 else "fall",
        "heat": f"{min(1.0, abs(word.log_ratio) / scale):.2f}",
        "figures": f"{word.log_ratio:+.3f} nats: {word.reference:.3f} before, "
        f"{word.policy:.3f} now",
    }


def _enlarged(image: Image.Image) -> Image.Image:
    side = max(image.size)
    size = (max(1, _SIDE * image.width // side), max(1, _SIDE * image.height // side))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def heat_image(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """An image that is light where weights are large, and dark where they are small.

    Args:
        image: any size.
        weights: [rows, columns], at least 0.
    """
    shown = _enlarged(image)
    most = float(weights.max())
    share = np.sqrt(weights / most) if most > 0 else np.zeros_like(weights)
    grey = Image.fromarray((255 * share).astype(np.uint8))
    mask = np.asarray(grey.resize(shown.size, Image.Resampling.BILINEAR), float)[..., None] / 255
    pixels = np.asarray(shown, float)
    return Image.fromarray((pixels * (0.15 + 0.85 * mask)).astype(np.uint8))
