"""JSON files that hold one list of objects, an object a pair or a group of images.

As the annotations of HPDv2 are published. Fields are those of the reader of JSON lines; files are
kept in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.location import Form, Location
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import AbstractReader
from diffalign.data.pairs.formats.jsonl import JsonLines
from diffalign.data.pairs.groups import GroupColumns
from diffalign.data.rows import AbstractRows, ListRows, Schema, list_schema


@dataclass(frozen=True, kw_only=True)
class JsonList(AbstractReader):
    """One or more .json files."""

    form: ClassVar[Form] = "list"
    needs: ClassVar[str] = JsonLines.needs

    def schema(self, location: Location, config: PairConfig) -> Schema:
        return list_schema(location.files[0])

    def match(self, schema: Schema, config: PairConfig) -> PairColumns | GroupColumns | None:
        return JsonLines().match(schema, config)

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRows:
        assert location.root is not None
        return ListRows(location.files, location.root, columns.all())
