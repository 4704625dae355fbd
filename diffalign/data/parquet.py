"""Parquet and hub data sets with other names: `chosen` and `rejected`, or `image1` and `image2`.

Preferred images may be alone, as `chosen` or `image`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.data.columns import PairColumns, general_columns
from diffalign.data.reading import AbstractReader, Form, Location
from diffalign.data.rows import AbstractRows, AbstractRowStream
from diffalign.data.source import DataConfig
from diffalign.data.tables import open_table, table_columns


@dataclass(frozen=True, kw_only=True)
class Parquet(AbstractReader):
    """Parquet files or a hub data set with any columns that say which image is preferred."""

    form: ClassVar[Form] = "table"
    needs: ClassVar[str] = (
        "prompt (or caption) with chosen and rejected, or with image1, image2 and one number for "
        "each (label1 and label2, score1 and score2, votes_image1 and votes_image2), or with "
        "chosen alone"
    )

    def column_names(self, location: Location, config: DataConfig) -> tuple[str, ...]:
        return table_columns(location, config)

    def match(self, names: Sequence[str], config: DataConfig) -> PairColumns | None:
        return general_columns(config.columns, names, lower_is_better=config.lower_is_better)

    def open(
        self, location: Location, columns: PairColumns, config: DataConfig
    ) -> AbstractRows | AbstractRowStream:
        return open_table(location, columns, config)
