"""JSON lines: one object a pair, with a prompt and the paths of two images.

Relative paths start from the folder of the file. Names of the fields are those that other readers
know: `chosen` and `rejected`, or `image1` and `image2` with a number for each, and Pick-a-Pic's; or
`chosen` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.location import Form, Location
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import AbstractReader
from diffalign.data.pairs.groups import GroupColumns
from diffalign.data.pairs.recognition import recognise
from diffalign.data.rows import AbstractRows, LineRows, Schema, line_schema


@dataclass(frozen=True, kw_only=True)
class JsonLines(AbstractReader):
    """One or more .jsonl files."""

    form: ClassVar[Form] = "lines"
    needs: ClassVar[str] = (
        "prompt (or caption) with paths under chosen and rejected, or under image1, image2 and one "
        "number for each (label1 and label2, score1 and score2), or under path1 (preferred) and "
        "path2, or lists of them under images and "
        "scores (or ranks), or under chosen alone"
    )

    def schema(self, location: Location, config: PairConfig) -> Schema:
        return line_schema(location.files[0])

    def match(self, schema: Schema, config: PairConfig) -> PairColumns | GroupColumns | None:
        return recognise(
            config.columns, schema, lower_is_better=config.lower_is_better, pickapic=True
        )

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRows:
        assert location.root is not None
        return LineRows(location.files, location.root, columns.all())
