"""Make the playground's yes-or-no questions for rounds of responses, as POPE asks them.

    python scripts/make_playground_questions.py --out assets/playground/questions

For every object of a scene there is one question about it and one about an absent object, which is
chosen as in one of POPE's three splits, in turn by scene. No scene is one of those that models are
measured on, and none has a preference pair.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from make_playground_responses import as_stored

from diffalign.playground.multi_object_scenes import kinds_in, sample_multi_object_scene
from diffalign.playground.questions import NO, SPLITS, YES, absent_kinds, existence_question

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "prompt": pa.string(),
        "answer": pa.string(),
    }
)


def questions(scenes: int, seed: int) -> list[dict[str, object]]:
    """Rows of so many scenes."""
    rows: list[dict[str, object]] = []
    for number in range(scenes):
        scene = sample_multi_object_scene((seed, number))
        image = {"bytes": as_stored(scene), "path": f"{seed}-{number}.png"}
        absent = absent_kinds(scene, SPLITS[number % len(SPLITS)], seed=number)
        asked = [*((kind, YES) for kind in kinds_in(scene)), *((kind, NO) for kind in absent)]
        rows += [
            {
                "id": f"{seed}-{number}-{place}",
                "image": image,
                "prompt": existence_question(kind),
                "answer": answer,
            }
            for place, (kind, answer) in enumerate(asked)
        ]
    return rows


CARD = """---
license: apache-2.0
---
# Yes-or-no questions

{rows} questions about {scenes} playground scenes, half of them to be answered with yes: for every
object of a scene one about it, and one about an absent object, chosen as in POPE's splits in turn.
Columns: `image`, `prompt`, `answer`. Made by

    python scripts/make_playground_questions.py --out assets/playground/questions --scenes {scenes}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=40_000_003, help="of scenes")
    arguments = parser.parse_args()
    rows = questions(arguments.scenes, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), target, compression="zstd")
    card = CARD.format(rows=len(rows), scenes=arguments.scenes)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {target}: {len(rows)} rows, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
