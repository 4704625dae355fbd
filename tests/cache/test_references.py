"""Reference values on disk: what goes in comes out, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.cache.references import CachedReference, Contents, ReferenceWriter
from diffalign.errors import CacheError

FINGERPRINT = {
    "model": "abc",
    "seed": 3,
    "responses.conditions.crop": {"kind": "crop", "sizes": (1,)},
}


def contents(**changes: Any) -> Contents:
    settings: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "views": ("chosen", "chosen@crop"),
        "visits": 2,
        "pairs": 5,
        "pairs_per_shard": 3,
    }
    return Contents(**settings | changes)


def value(number: int, view: str, visit: int) -> float:
    return number + 0.5 * len(view) + 100 * visit


def fill(folder: Path, *, shards: slice = slice(None), unusable: frozenset[int] = frozenset()):
    writer = ReferenceWriter(folder, contents())
    for shard in writer.missing()[shards]:
        numbers = [n for n in range(shard.start, shard.stop) if n not in unusable]
        values = {
            view: torch.tensor([value(n, view, shard.visit) for n in numbers])
            for view in writer.contents.views_of(shard.visit)
        }
        writer.write(shard, [f"pair-{n}" for n in numbers], values)
    return writer


def opened(folder: Path, **changes: Any) -> CachedReference:
    asked: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "views": frozenset({"chosen", "chosen@crop"}),
        "visits": 2,
    }
    return CachedReference.open(folder, **asked | changes)


def test_values_come_back_by_sample_view_and_sample(tmp_path):
    fill(tmp_path)
    found = opened(tmp_path)(["pair-4", "pair-0", "pair-4"], [0, 1, 1])
    crops = [value(4, "chosen@crop", 0), value(0, "chosen@crop", 1), value(4, "chosen@crop", 1)]
    assert found["chosen@crop"].tolist() == crops
    assert found["chosen"].tolist() == [value(n, "chosen", 0) for n in (4, 0, 4)]


def test_a_view_without_a_condition_has_one_sample(tmp_path):
    writer = fill(tmp_path)
    assert [shard.visit for shard in writer.contents.shards] == [0, 0, 1, 1]
    assert writer.contents.views_of(1) == {"chosen@crop"}
    found = opened(tmp_path, views=frozenset({"chosen"}), visits=1)(["pair-2"], [7])
    assert found == {"chosen": torch.tensor([value(2, "chosen", 0)])}


def test_what_was_started_goes_on_with_what_is_missing(tmp_path):
    fill(tmp_path, shards=slice(0, 2))
    with pytest.raises(CacheError, match=r"not complete: 2 of 4 files are missing. Finish it"):
        opened(tmp_path)
    assert [shard.start for shard in ReferenceWriter(tmp_path, contents()).missing()] == [0, 3]
    fill(tmp_path)
    assert ReferenceWriter(tmp_path, contents()).missing() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": FINGERPRINT | {"seed": 4}}, "seed was 3 there and is 4 here"),
        ({"fingerprint": {"likelihood.reduction": "sum"}}, "likelihood.reduction was None there"),
        ({"views": frozenset({"rejected"})}, "this run needs rejected as well"),
        ({"visits": 3}, "has 2 samples, and responses.visits is 3"),
    ],
)
def test_values_of_another_run_are_refused_by_what_differs(tmp_path, changes, message):
    fill(tmp_path)
    with pytest.raises(CacheError, match=rf"{message}.*diffalign precompute CONFIG.yaml"):
        opened(tmp_path, **changes)


def test_a_run_may_depend_on_less(tmp_path):
    fill(tmp_path)
    opened(tmp_path, fingerprint={"model": "abc"}, views=frozenset({"chosen"}), visits=1)


@pytest.mark.parametrize("changes", [{"fingerprint": {"model": "x"}}, {"views": ("chosen",)}])
def test_a_folder_of_other_values_is_not_written_into(tmp_path, changes):
    before = fill(tmp_path).folder.joinpath("index.json").read_bytes()
    with pytest.raises(CacheError, match="or remove the folder"):
        ReferenceWriter(tmp_path, contents(**changes))
    assert (tmp_path / "index.json").read_bytes() == before


def test_a_sample_without_a_value_is_named(tmp_path):
    fill(tmp_path, unusable=frozenset({3}))
    cached = opened(tmp_path)
    cached(["pair-4"], [1])
    with pytest.raises(CacheError, match="has no values of pair-3"):
        cached(["pair-4", "pair-3"], [1, 0])


def test_a_file_may_be_of_unusable_pairs_alone(tmp_path):
    fill(tmp_path, unusable=frozenset({3, 4}))
    assert opened(tmp_path)(["pair-2"], [1])["chosen"].tolist() == [value(2, "chosen", 0)]


def test_what_is_absent_or_damaged_is_told_apart(tmp_path):
    with pytest.raises(CacheError, match="holds no reference values: compute them"):
        opened(tmp_path)
    shard = fill(tmp_path).contents.shards[1]
    (tmp_path / shard.name).write_bytes(b"rubbish")
    with pytest.raises(CacheError, match=r"pairs-00000003\.safetensors is damaged"):
        opened(tmp_path)


def test_the_words_of_the_folder_are_those_that_others_were_written_with(tmp_path):
    folder = fill(tmp_path).folder
    assert '"draws": 2' in (folder / "index.json").read_text()
    assert (folder / "draw-1-pairs-00000003.safetensors").is_file()
