"""Blocks of a plan: what is done, what is missing, what is merged, and by whom."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffalign.blocks import AbstractPlan, Block, Do, Failed, Recipe, Row, Worker, here, share
from diffalign.errors import BusyError, DiffalignError
from diffalign.files import add_json_lines, read_json_lines
from diffalign.sessions import Shard, complete, held

NUMBERS = tuple(range(7))


class Squares(AbstractPlan):
    """Squares of numbers, a few a block; negative ones fail."""

    title, unit = "squares", "numbers"

    def __init__(self, folder: Path, numbers: Sequence[int] = NUMBERS, *, size: int = 2) -> None:
        self.folder, self.opened, self.merged = folder, 0, 0
        self.blocks = [
            Block.of(i, list(some), len(some), some)
            for i, some in enumerate(numbers[k : k + size] for k in range(0, len(numbers), size))
        ]
        self.there = [row["n"] for row in self.rows()]

    def rows(self) -> list[Any]:
        path = self.folder / "squares.jsonl"
        return read_json_lines(path) if path.exists() else []

    def is_done(self, block: Block) -> bool:
        return all(number in self.there for number in block.work)

    def open(self, device: str | None, upcoming: Sequence[Block]) -> Do:
        self.opened += 1
        return lambda block: [
            Row({"n": n, "square": n * n}) if n >= 0 else Failed({"n": n, "reason": f"{n} < 0"})
            for n in block.work
            if n not in self.there
        ]

    def merge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.merged += 1
        add_json_lines(self.folder / "squares.jsonl", rows)


def numbers(folder: Path) -> list[int]:
    return [row["n"] for row in Squares(folder).rows()]


def test_a_plan_is_done_once_and_merged_in_its_order(tmp_path):
    plan = Squares(tmp_path)
    for block in reversed(plan.blocks):
        Worker(plan).do(block.name)
    assert not (tmp_path / "squares.jsonl").exists()
    complete(lambda: Squares(tmp_path), lambda *_: pytest.fail("all blocks are there"))
    assert numbers(tmp_path) == list(NUMBERS)
    assert not plan.store.exists()
    complete(lambda: Squares(tmp_path), lambda *_: pytest.fail("all rows are there"))
    assert not plan.store.exists()


def test_a_worker_opens_once_and_leaves_out_what_is_there(tmp_path):
    plan = Squares(tmp_path)
    worker = Worker(plan)
    assert [worker.do(block.name) for block in plan.blocks] == [2, 2, 2, 1]
    assert plan.opened == 1
    again = Worker(plan)
    assert sum(again.do(block.name) for block in plan.blocks) == 7
    assert plan.opened == 1


def test_what_a_merge_left_half_done_is_not_doubled(tmp_path):
    plan = Squares(tmp_path)
    for block in plan.blocks:
        Worker(plan).do(block.name)
    add_json_lines(tmp_path / "squares.jsonl", [{"n": n, "square": n * n} for n in NUMBERS])
    with (tmp_path / "squares.jsonl").open("a") as file:
        file.write('{"n": 7')
    complete(lambda: Squares(tmp_path), here())
    assert numbers(tmp_path) == list(NUMBERS)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "list"])
def test_a_damaged_block_is_made_again(tmp_path, damage):
    plan = Squares(tmp_path)
    for block in plan.blocks:
        Worker(plan).do(block.name)
    file = plan.file(plan.blocks[1])
    content = file.read_bytes()
    assert b'"square": 9' in content
    file.write_bytes(
        {
            "flip": content.replace(b'"square": 9', b'"square": 8'),
            "cut": b"".join(content.splitlines(keepends=True)[:-1]),
            "empty": b"",
            "list": b"[]\n",
        }[damage]
    )
    session = complete(lambda: Squares(tmp_path), here())
    assert [block.name for block in session.pending] == [plan.blocks[1].name]
    assert Squares(tmp_path).rows() == [{"n": n, "square": n * n} for n in NUMBERS]


def test_failures_are_listed_and_tried_again_by_the_next_start(tmp_path):
    session = complete(lambda: Squares(tmp_path, (1, -2, 3)), here())
    assert [failed["reason"] for failed in session.failed] == ["-2 < 0"]
    assert numbers(tmp_path) == [1, 3]
    again = complete(lambda: Squares(tmp_path, (1, -2, 3)), here())
    assert [block.work for block in again.pending] == [(1, -2)]
    assert numbers(tmp_path) == [1, 3]


def test_sixteen_failures_in_a_row_end_the_run_and_one_success_between_does_not(tmp_path):
    bad = tuple(range(-40, 0))
    with pytest.raises(DiffalignError, match=r"squares: 16 numbers in a row failed.*-25 < 0"):
        complete(lambda: Squares(tmp_path / "a", bad), here())
    mixed = tuple(n for k in bad[:30] for n in ((k, -k) if k % 10 == 0 else (k,)))
    assert len(complete(lambda: Squares(tmp_path / "b", mixed), here()).failed) == 30


def test_rows_of_a_plan_that_was_not_finished_are_kept_for_another(tmp_path):
    first = Squares(tmp_path)
    with held(tmp_path) as session:
        session.begin(lambda: first)
        Worker(first).do(first.blocks[1].name)
    session = complete(lambda: Squares(tmp_path, (2, 3, 10), size=1), here())
    assert [block.work for block in session.pending] == [(10,)]
    assert numbers(tmp_path) == [2, 3, 10]


def test_the_last_of_two_shards_merges_even_if_both_end_together(tmp_path):
    with (
        held(tmp_path, shard=Shard.parse("1/2")) as one,
        held(tmp_path, shard=Shard.parse("2/2")) as two,
    ):
        first, second = (s.begin(lambda: Squares(tmp_path)) for s in (one, two))
        assert [len(s.pending) for s in (one, two)] == [2, 2]
        missing = one.run(first, here())
        assert missing is not None and missing.of_shards == [2]
        assert two.run(second, here()) is None
        assert (first.merged, second.merged) == (0, 1)
        with (
            pytest.raises(BusyError, match="in use"),
            held(tmp_path, shard=Shard.parse("1/2")) as s,
        ):
            s.begin(lambda: Squares(tmp_path))
    with held(tmp_path, shard=Shard.parse("1/2")) as one:
        assert one.run(one.begin(lambda: Squares(tmp_path)), here()) is None
    assert numbers(tmp_path) == list(NUMBERS)
    assert not list(tmp_path.glob(".shard*"))


def test_shares_are_of_the_plan_and_no_block_is_left_out():
    assert [share("abcdefg", number=n, of=3) for n in range(3)] == ["adg", "be", "cf"]


def test_a_block_of_other_contents_has_another_name():
    names = {Block.of(i, content, 1, None).name for i in (0, 1) for content in ([1], [2], ["1"])}
    assert len(names) == 6


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: Path
    numbers: tuple[int, ...] = (1, 2)


def squares_of(settings: Settings, size: int) -> Squares:
    return Squares(settings.folder, settings.numbers, size=size)


def test_a_recipe_travels_as_plain_settings(tmp_path):
    recipe = Recipe(squares_of, Settings(folder=tmp_path), {"size": 1})
    there: Any = pickle.loads(pickle.dumps(recipe))
    assert there == recipe
    assert [b.name for b in there().blocks] == [b.name for b in recipe().blocks]
    assert json.dumps(str(tmp_path)) and len(there().blocks) == 2
