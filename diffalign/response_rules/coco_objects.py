"""The 80 objects of COCO in texts and in images, as CHAIR and Object HalBench find them.

In a text an object is found by words: lower case, singular, two words that mean one thing joined,
then a table of synonyms. In an image it is there by COCO's annotations, which CHAIR merges with
what the same routine finds in the reference captions.

Source: LisaAnne/Hallucination, the released code of Rohrbach et al. 2018, arXiv:1809.02156.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.responses.coco import image_number
from diffalign.errors import DataError
from diffalign.files import numbered_lines, read_json
from diffalign.parsing import checked, shortly
from diffalign.response_rules.words import Singulariser, Tokeniser, rule_singular, rule_tokens

_THEMSELVES = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, "
    "fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, "
    "tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear, hair drier, "
    "potted plant, laptop computer, stove top oven, home plate, train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"

DOUBLE_WORDS: Mapping[str, str] = {
    **{word: word for word in _THEMSELVES.split(", ")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split()},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}
"""Two neighbouring singulars and the word that they are read as. `stove top oven` is three words
and never found; `wine glas` is what the singulariser leaves of `wine glass`."""


@dataclass(frozen=True)
class Synonyms:
    """The table of classes."""

    class_of: Mapping[str, str]
    """The class of every word that represents one, itself included."""

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(self.class_of.values())


def read_synonyms(path: Path, *, refined: bool = False) -> Synonyms:
    """Read the published table: a class a line, first its name, then what else it is called.

    Args:
        path: `synonyms.txt` of LisaAnne/Hallucination, or `synonyms_refine.txt` of RLHF-V.
        refined: take blanks off every entry. The published table has two blanks before `motor bike`
            and `cheesecake`, so that these two are never found; published figures contain this.

    Raises:
        DataError: there is no such file, or it holds no table.
    """
    absent = "there is no such file; it is data/synonyms.txt of LisaAnne/Hallucination"
    lines = [line for _, line in numbered_lines(path, absent=absent)]
    class_of: dict[str, str] = {}
    for line in lines:
        words = line.strip().split(", ")
        words = [word.strip() for word in words] if refined else words
        class_of.update(dict.fromkeys(filter(None, words), words[0].strip()))
    if not class_of:
        raise DataError(f"{path}: holds no class; it needs one a line, synonyms parted by commas")
    return Synonyms(class_of)


@dataclass(frozen=True, kw_only=True)
class ObjectWords:
    """The published routine that finds the objects of a sentence."""

    synonyms: Synonyms
    tokenise: Tokeniser = rule_tokens
    singularise: Singulariser = rule_singular
    double_words: Mapping[str, str] = field(default_factory=lambda: DOUBLE_WORDS)
    """Two neighbouring singulars and the word that they are read as."""

    def __call__(self, sentence: str) -> list[str]:
        """The class of every mention, in the order of the sentence; repetitions stay.

        Source: `caption_to_words` of the released code.
        """
        return [self.synonyms.class_of[word] for word in self.words(sentence)]

    def words(self, sentence: str) -> list[str]:
        """The words of the table that are mentioned, likewise."""
        words = self._joined([self.singularise(w) for w in self.tokenise(sentence.lower())])
        if "toilet" in words and "seat" in words:  # the seat of a toilet is not a chair
            words = [word for word in words if word != "seat"]
        return [word for word in words if word in self.synonyms.class_of]

    def _joined(self, words: Sequence[str]) -> list[str]:
        joined, place = [], 0
        while place < len(words):
            pair = " ".join(words[place : place + 2])
            joined.append(self.double_words.get(pair, words[place]))
            place += 2 if pair in self.double_words else 1
        return joined


def read_image_objects(path: Path, synonyms: Synonyms) -> dict[str, frozenset[str]]:
    """Read the classes of each image: `{image_id: [class, ...]}`.

    Raises:
        DataError: it is something else, or names what is no class of the table.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise DataError(f"{path}: must be one object of lists, {{image_id: [class, ...]}}")
    content = checked(dict[str, list[str]], content, path)
    if not content:
        raise DataError(f"{path}: holds no image")
    unknown = sorted({n for names in content.values() for n in names} - synonyms.classes)
    if unknown:
        raise DataError(
            f"{path}: {', '.join(unknown[:5])} is no class of the table of synonyms, so no caption "
            "could ever mention it; write the classes by the first word of their line"
        )
    return {image_id: frozenset(names) for image_id, names in content.items()}


def coco_objects(
    instances: Iterable[Path], captions: Iterable[Path], objects_of: ObjectWords
) -> dict[str, frozenset[str]]:
    """Classes of each image by COCO's own annotations, merged as CHAIR does.

    Args:
        instances: `instances_train2014.json` and `instances_val2014.json`.
        captions: `captions_train2014.json` and `captions_val2014.json`.
        objects_of: the routine that reads the reference captions.

    Raises:
        DataError: a file is missing or no annotation file of COCO.
    """
    found: dict[str, set[str]] = {}
    for path in instances:
        content = _coco_file(path, "categories")
        names = {
            str(category["id"]): str(category["name"])
            for category in _entries(content, "categories", ("id", "name"), path)
        }
        for annotation in _entries(content, "annotations", ("image_id", "category_id"), path):
            name = names.get(str(annotation["category_id"]))
            if name is None:
                raise DataError(
                    f"{path}: an annotation is of category {shortly(annotation['category_id'])}, "
                    f"which is none of its categories"
                )
            if name not in objects_of.synonyms.class_of:
                raise DataError(f"{path}: the category {name!r} is not in the table of synonyms")
            name = objects_of.synonyms.class_of[name]
            found.setdefault(_plain_id(annotation["image_id"]), set()).add(name)
    for path in captions:
        content = _coco_file(path, "images")
        for annotation in _entries(content, "annotations", ("image_id", "caption"), path):
            mentioned = objects_of(str(annotation["caption"]))
            found.setdefault(_plain_id(annotation["image_id"]), set()).update(mentioned)
    return {image_id: frozenset(names) for image_id, names in found.items()}


def _plain_id(image_id: Any) -> str:
    """Without padding and so on: annotations of one image belong together."""
    number = image_number(image_id)
    return str(image_id) if number is None else str(number)


def _coco_file(path: Path, key: str) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not {"annotations", key} <= set(content):
        raise DataError(f"{path}: no annotation file of COCO: it needs annotations and {key}")
    return content


def _entries(
    content: Mapping[str, Any], name: str, keys: Sequence[str], path: Path
) -> list[dict[str, Any]]:
    """One of the lists of an annotation file, of which every object has some keys."""
    entries = checked(list[dict], content[name], f"{path}: {name}")
    for number, entry in enumerate(entries):
        missing = [key for key in keys if key not in entry]
        if missing:
            raise DataError(f"{path}: {name}: {number} has no {', '.join(missing)}")
    return entries
