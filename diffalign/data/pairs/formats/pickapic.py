"""Pick-a-Pic v1 and v2: two JPEGs a row, and labels 0, 0.5 or 1 that people gave by a click.

Columns are those of both, and of the mirrors that `docs/data.md` names, which have one schema:
`jpg_0`, `jpg_1` (bytes), `label_0`, `label_1` (0, 0.5 or 1), `caption`, `has_label`,
`ranking_id`, `image_0_uid`, `image_1_uid`, and more that is not read.

Source: Kirstain et al. 2023, arXiv:2305.01569.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.location import Form, Location
from diffalign.data.pairs.columns import PairColumns
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import AbstractReader
from diffalign.data.pairs.groups import GroupColumns
from diffalign.data.pairs.known_columns import pickapic_columns
from diffalign.data.pairs.recognition import found_groups, refuse_left_out
from diffalign.data.rows import AbstractRows, AbstractRowStream, Schema
from diffalign.data.tables import open_table, table_schema


@dataclass(frozen=True, kw_only=True)
class PickAPic(AbstractReader):
    """Parquet files or a hub data set with Pick-a-Pic's columns."""

    form: ClassVar[Form] = "table"
    needs: ClassVar[str] = "caption, jpg_0, jpg_1, label_0, label_1"

    def schema(self, location: Location, config: PairConfig) -> Schema:
        return table_schema(location, config)

    def match(self, schema: Schema, config: PairConfig) -> PairColumns | None:
        if config.columns or found_groups(schema, config.lower_is_better):
            return None
        columns = pickapic_columns(schema.names, lower_is_better=config.lower_is_better)
        if columns is not None:
            refuse_left_out(columns, schema.names)
        return columns

    def open(
        self, location: Location, columns: PairColumns | GroupColumns, config: PairConfig
    ) -> AbstractRows | AbstractRowStream:
        return open_table(location, columns.all(), config, streaming=config.streaming)
