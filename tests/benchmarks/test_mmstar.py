"""Multiple choice: letters by the published rule, by text, and by the model's own probabilities."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign import config
from diffalign.benchmarks.mmstar.config import MMStar
from diffalign.benchmarks.mmstar.rules import (
    options_in,
    read_letter,
    read_questions,
    read_text_of,
)
from diffalign.errors import ConfigError, DataError
from tests.judges.chat_server import serving
from tests.tiny_vlm import tiny_llava

OPTIONS = {"A": "a red bus", "B": "a dog", "C": "two cats"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b. a dog", "B"),
        ("(C) two cats", "C"),
        ("Option A", "A"),
        ("The answer is C.", "C"),
        (" A cat is there", "A"),  # a letter is a letter
        ("I think B", None),
        ("Answer: B", "A"),  # and so is the first one of Answer
        ("", None),
    ],
)
def test_the_published_rule_reads_the_first_letter(response, letter):
    assert read_letter(response) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("I think B", "B"),
        ("Answer: B", "B"),
        ("A. It is red", "A"),
        ("I see a bus, so B is it. A dog!", "B"),
        ("There is a dog here", "B"),
        ("a dog next to two cats", None),
        ("B or C", None),
        ("", None),
    ],
)
def test_text_finds_the_one_letter_or_option(response, letter):
    assert read_text_of(response, OPTIONS) == letter


def test_options_are_found_in_a_question():
    text = "What is it?\nOptions: A: a red, long bus, B: a dog, C: 3.5 m"
    assert options_in(text) == {"A": "a red, long bus", "B": "a dog", "C": "3.5 m"}
    assert options_in("Is it A or B?") == {}


ROWS = [
    {"index": 0, "question": "Q?\nOptions: A: x, B: y", "answer": "B", "category": "math"},
    {"index": 1, "question": "Q?\nOptions: A: x, B: y, C: z, D: w", "answer": "A", "category": ""},
]


def test_every_layout_gives_the_same_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with (tmp_path / "q.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS[0], "image"], delimiter="\t")
        writer.writeheader()
        writer.writerows({**row, "image": "iVBORw0KGgo" * 50} for row in ROWS)
    images = pa.array([b"png", b"png"])
    pq.write_table(
        pa.Table.from_pylist(ROWS).append_column("image", images), tmp_path / "q.parquet"
    )
    first, *others = (
        read_questions(tmp_path / f"q.{kind}") for kind in ("jsonl", "tsv", "parquet")
    )
    assert [(q.question_id, q.label, q.image) for q in first] == [
        ("0", "B", "0.jpg"),
        ("1", "A", "1.jpg"),
    ]
    assert others == [first, first]


def test_columns_and_lists_of_options_are_written_below_the_question(tmp_path):
    rows = [
        {"id": "a", "question": "Q?", "answer": "(b)", "A": "x", "B": "y", "C": None},
        {"id": "b", "question": "Q?", "answer": "A", "options": ["x", "y"], "image": "1.png"},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    one, two = read_questions(tmp_path / "q.json")
    assert one.text == two.text == "Q?\nA. x\nB. y"
    assert (one.label, two.image) == ("B", "1.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?"}, "item 1 has no answer"),
        ({"question": "Q?", "answer": "A"}, "item 1 has no options: give columns A, B"),
        ({**ROWS[0], "answer": "C"}, "item 1: answer must be one of A, B, got 'C'"),
    ],
)
def test_questions_that_are_none_are_refused(tmp_path, row, message):
    (tmp_path / "q.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "q.json")


def evaluated(folder, *settings: str):
    (folder / "q.json").write_text(json.dumps(ROWS))
    few = "bootstrap.resamples=100"
    return config.load(MMStar, None, [f"questions={folder / 'q.json'}", *settings, few]).report()


def test_figures_worked_by_hand(tmp_path):
    said = [{"question_id": 0, "prediction": "B"}, {"question_id": 1, "prediction": "Well, x"}]
    (tmp_path / "a.json").write_text(json.dumps(said))
    by_letter = evaluated(tmp_path, f"responses={tmp_path / 'a.json'}")
    values = {name: figure.value for name, figure in by_letter.whole.figures.items()}
    assert values == {
        "accuracy": 50,
        "above_chance": pytest.approx(100 * (1 - 1 / 2 - 1 / 4) / 2),
        "unread_ratio": 50,
        "mean_length": 1.5,
    }
    assert by_letter.parts["math"].figures["accuracy"].value == 100
    by_text = evaluated(tmp_path, f"responses={tmp_path / 'a.json'}", "read=text")
    assert by_text.whole.figures["accuracy"].value == 100


def served(folder, address: str) -> list[str]:
    return [
        *("asking.engine=endpoint", f"asking.endpoint.address={address}"),
        *("asking.endpoint.model=tiny", f"asking.images={folder}"),
        f"asking.saves={folder / 'kept.jsonl'}",
    ]


def test_likelihood_needs_a_model_of_this_machine(tmp_path):
    for source in (["responses=x"], served(tmp_path, "http://a/v1")):
        with pytest.raises(ConfigError, match="read=likelihood needs a model of this machine"):
            evaluated(tmp_path, "read=likelihood", *source)


def test_a_served_model_is_asked(tmp_path):
    for number in (0, 1):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    with serving(lambda content: "B") as server:
        report = evaluated(tmp_path, *served(tmp_path, server.address))
    assert report.whole.figures["accuracy"].value == 50
    assert report.settings["endpoint"] == "tiny"


def test_the_most_probable_letter_is_the_choice(tmp_path):
    model = tiny_llava(tmp_path / "model")
    for number in (0, 1):
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    settings = [
        *("model.kind=vlm", f"model.path={model}", "read=likelihood", "suffix=''"),
        *(f"asking.images={tmp_path}", f"asking.saves={tmp_path / 'kept.jsonl'}"),
    ]
    report = evaluated(tmp_path, *settings)
    assert report.whole.counts["unread"] == 0
    chosen = [row["answer"] for row in report.details]
    assert chosen == expected(model, tmp_path)
    assert evaluated(tmp_path, *settings).details == report.details  # from what was kept


def expected(model, folder) -> list[str]:
    """Letters by hand: the whole vocabulary's probabilities of the first token."""
    import torch

    from diffalign.models.vlm.config import VLM

    loaded = VLM(path=str(model)).load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="none"
    )
    tokenizer = loaded.processor.tokenizer
    letters = []
    for row in ROWS:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = loaded.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        image = Image.open(folder / f"{row['index']}.png").convert("RGB")
        (found,) = loaded.first_token_probabilities([prompt], [[image]])
        options = options_in(str(row["question"]))
        letters.append(max(options, key=lambda o: float(found[tokenizer.convert_tokens_to_ids(o)])))
    return letters
