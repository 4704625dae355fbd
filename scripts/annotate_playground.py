"""Rank groups of playground images as a patient person would, and write the preferences file.

    python scripts/annotate_playground.py runs/playground_groups

The head of configs/playground/d3po_feedback.yaml has the command that samples the groups, and the
one that trains on what this writes.

The annotator sees nothing but the images and their prompts, and says what the oracle thinks:
best first, images of equal fidelity as ties.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path

from PIL import Image

from diffalign.playground.oracle import fidelity, read_objects
from diffalign.rollouts.groups import Group, read_groups


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what diffalign generate wrote")
    parser.add_argument("--out", type=Path, help="default: preferences.jsonl in that folder")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    groups = read_groups(args.folder)
    target = args.out or args.folder / "preferences.jsonl"
    with target.open("w") as file:
        for group in groups:
            row = {"group": group.group, "ranking": rank(args.folder, group)}
            file.write(json.dumps(row) + "\n")
    print(f"wrote {target}: {len(groups)} groups")


def rank(folder: Path, group: Group) -> list[list[int]]:
    """The indices of a group's images, best first, those of equal fidelity together."""
    scores = {
        i: fidelity(read_objects(Image.open(folder / file)), group.prompt)
        for i, file in enumerate(group.images)
    }
    ranked = sorted(scores, key=lambda i: -scores[i])
    return [list(equal) for _, equal in groupby(ranked, key=lambda i: scores[i])]


if __name__ == "__main__":
    main()
