"""Parquet and hub data sets with other names: `chosen` and `rejected`, or `image1` and `image2`.

Preferred images may be alone, as `chosen` or `image`.
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
from diffalign.data.rows import AbstractRows, AbstractRowStream, Schema
from diffalign.data.tables import open_table, table_schema


@dataclass(frozen=True, kw_only=True)
class Parquet(AbstractReader):
    """Parquet files or a hub data set with any columns that say which image is preferred."""

    form: ClassVar[Form] = "table"
    needs: ClassVar[str] = (
        "prompt (or caption) with chosen and rejected, or with image1, image2 and one number for "
        "each (label1 and label2, score1 and score2, votes_image1 and votes_image2), or with "
        "images and scores (or ranks) that are lists, or with chosen alone"
    )

    def schema(self, location: Location, config: PairConfig) -> Schema:
        return table_schema(location, config)

    def match(self, schema: Schema, config: PairConfig) -> PairColumns | GroupColumns | None:
        return recognise(config.columns, schema, lower_is_better=config.lower_is_better)

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRows | AbstractRowStream:
        return open_table(location, columns.all(), config, streaming=config.streaming)
