"""CHAIR: how many of the objects that a caption mentions are not in the image.

Objects are the 80 classes of COCO, found in captions and images by `response_rules.coco_objects`.

Source: Rohrbach et al. 2018, Object hallucination in image captioning, arXiv:1809.02156; word rules
as in their released code (LisaAnne/Hallucination). Recall as in later forks of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffalign.benchmarks.report import Measure, Panel, panel
from diffalign.benchmarks.saved_responses import (
    RESPONSE_KEYS,
    image_id_of,
    read_objects,
    text_of,
)
from diffalign.intervals import Bootstrap, ratio
from diffalign.response_rules.mentions import Caption, CheckedCaption

MEASURES: Mapping[str, Measure] = {
    "chair_i": Measure(
        "CHAIR-i, mentions hallucinated",
        "percent",
        lambda t: 100 * ratio(t["hallucinated_mentions"], t["object_mentions"]),
    ),
    "chair_s": Measure(
        "CHAIR-s, captions that hallucinate",
        "percent",
        lambda t: 100 * ratio(t["hallucinating_captions"], t["captions"]),
    ),
    "recall": Measure(
        "recall of the objects in the images",
        "percent",
        lambda t: 100 * ratio(t["objects_found"], t["objects"]),
    ),
    "repetition_i": Measure(
        "mentions of an object named before",
        "percent",
        lambda t: 100 * ratio(t["repeated_mentions"], t["object_mentions"]),
    ),
    "repetition_s": Measure(
        "captions that name an object twice",
        "percent",
        lambda t: 100 * ratio(t["repeating_captions"], t["captions"]),
    ),
    "mean_length": Measure(
        "mean length in words", "words", lambda t: ratio(t["words"], t["captions"])
    ),
}
"""CHAIR-i counts repeated mentions, recall distinct classes; words are what blanks part. Repetition
is not part of the paper: an object named again in place of one that is missed raises neither CHAIR
nor lowers what CHAIR-i divides by, and shows in recall alone."""


def chair_panel(checked: Sequence[CheckedCaption], bootstrap: Bootstrap) -> Panel:
    """CHAIR-i, CHAIR-s and recall in percent and the mean length in words, images resampled.

    Args:
        checked: at least one caption; several of one image are one cluster of resampling
            resampling.
        bootstrap: how intervals are made.

    Source: equations of section 2 of the paper.
    """
    images = dict.fromkeys(c.caption.image_id for c in checked)
    places = {image_id: place for place, image_id in enumerate(images)}
    names = (
        "captions",
        "words",
        "object_mentions",
        "hallucinated_mentions",
        "hallucinating_captions",
        "objects",
        "objects_found",
        "repeated_mentions",
        "repeating_captions",
    )
    counts = np.zeros((len(names), len(places)))
    for c in checked:
        counts[:, places[c.caption.image_id]] += (
            1,
            len(c.caption.text.split()),
            len(c.mentions),
            len(c.hallucinated),
            bool(c.hallucinated),
            len(c.truth),
            len(c.found),
            len(c.repeated),
            bool(c.repeated),
        )
    tally = dict(zip(names, counts, strict=True))
    return panel(tally, MEASURES, bootstrap, names=list(images))


def read_captions(path: Path) -> list[Caption]:
    """Captions as `{image_id, caption}`, a list or one a line; the name of the file will do as id.

    Raises:
        DataError: an item has no image or no text.
    """
    return [
        Caption(
            image_id=image_id_of(row, path=path, number=number),
            text=text_of(row, RESPONSE_KEYS, path=path, number=number),
        )
        for number, row in enumerate(read_objects(path), start=1)
    ]
