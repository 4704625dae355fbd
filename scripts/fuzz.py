"""Damage the files that each reader reads, and see that only our own errors come out.

    python scripts/fuzz.py                        # 20,000 files over all readers
    python scripts/fuzz.py --cases 500 --seed 3 --only "score column"

Prints a line a reader: files that were read although damaged, refused in a sentence, or ended in a
traceback; and each kind of traceback once, with the file that makes it. The exit status is the
number of kinds, at most 100.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from tests.readers import READERS, cases, outcome, prepared


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="files over all readers")
    parser.add_argument("--seed", type=int, default=0, help="other seeds damage otherwise")
    parser.add_argument("--only", choices=sorted(READERS), help="this reader alone")
    parser.add_argument("--keep", type=Path, help="folder for files that end in a traceback")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [given.only] if given.only else list(READERS)
    console = Console(highlight=False, width=100)
    table = Table("reader", "files", "read", "refused", "tracebacks", "seconds", box=None)
    kinds: dict[str, str] = {}
    totals: Counter[str] = Counter()
    started = time.monotonic()
    for place, name in enumerate(names):
        count = given.cases // len(names) + (place < given.cases % len(names))
        began = time.monotonic()
        found = _fuzz(name, count, given.seed, kinds, given.keep)
        totals += found
        figures = [str(found[what]) for what in ("read", "refused", "traceback")]
        table.add_row(name, str(count), *figures, f"{time.monotonic() - began:.1f}")
    figures = [str(totals[what]) for what in ("read", "refused", "traceback")]
    seconds = f"{time.monotonic() - started:.0f}"
    table.add_row("all", str(totals.total()), *figures, seconds, style="bold")
    console.print(table)
    for kind, where in kinds.items():
        console.print(f"{kind}\n  {where}", markup=False, soft_wrap=True)
    return min(len(kinds), 100)


def _fuzz(
    name: str, count: int, seed: int, kinds: dict[str, str], keep: Path | None
) -> Counter[str]:
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        reader = prepared(READERS[name], Path(folder))
        for number, content in enumerate(islice(cases(reader, seed), count)):
            try:
                found[outcome(reader, Path(folder), content)] += 1
            except Exception as error:
                found["traceback"] += 1
                frames = traceback.extract_tb(error.__traceback__)
                own = [frame for frame in frames if "diffalign" in frame.filename] or frames
                place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
                kind = f"{name}: {type(error).__name__} at {place}: {str(error)[:200]!r}"
                key = f"{name}: {type(error).__name__} at {place}"
                if not any(known.startswith(key) for known in kinds):
                    kinds[kind] = f"file {number}: {content[:300]!r}"
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        file = f"{len(kinds):03d}-{Path(reader.file).name}"
                        (keep / file).write_bytes(content)
    return found


if __name__ == "__main__":
    sys.exit(main())
