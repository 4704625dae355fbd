"""The evaluate job whole, through the command line: one JSON object, or tables for people."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest

from diffalign.cli import app
from diffalign.errors import ConfigError, DataError
from tests.judges.chat_server import serving

FEW = "bootstrap.resamples=100"


def evaluate(*arguments: str) -> str:
    """What is printed to standard output alone."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(["evaluate", *arguments, FEW], standalone_mode=False)
    return printed.getvalue()


def lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chair(tmp_path) -> list[str]:
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat, kitten\nbus\n")
    (tmp_path / "objects.json").write_text('{"1": ["dog"], "2": ["cat", "dog"], "9": []}')
    captions = lines(
        tmp_path / "captions.jsonl",
        {"image_id": 1, "caption": "A puppy and a cat."},
        {"image_id": 2, "caption": "Two dogs"},
        {"image_id": 77, "caption": "A dog"},
    )
    return [
        "chair",
        f"captions={captions}",
        f"objects={tmp_path / 'objects.json'}",
        f"synonyms={tmp_path / 'synonyms.txt'}",
    ]


@pytest.fixture
def pope(tmp_path) -> list[str]:
    arguments = ["pope"]
    for split, responses in (("random", ["Yes", "No"]), ("popular", ["Yes", "Yes"])):
        questions = [
            {"question_id": n, "image": f"{n}.jpg", "text": "Is there a dog?", "label": label}
            for n, label in enumerate(("yes", "no", "no"), start=1)
        ]
        said = [{"question_id": n, "answer": a} for n, a in enumerate(responses, start=1)]
        arguments += [
            f"questions.{split}={lines(tmp_path / f'q_{split}.json', *questions)}",
            f"responses.{split}={lines(tmp_path / f'a_{split}.json', *said)}",
        ]
    return arguments


@pytest.fixture
def amber(tmp_path) -> list[str]:
    content = {
        "annotations": [
            {"id": 1, "type": "generative", "truth": ["dog", "table"], "hallu": ["cat", "bird"]},
            {"id": 2, "type": "generative", "truth": ["car", "tree"], "hallu": ["bird"]},
            {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
            {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
            {"id": 5, "type": "relation", "truth": "no"},
        ],
        "relation": {
            "dog": ["puppy"],
            "cat": ["kitten"],
            "table": ["desk"],
            "tree": ["forest"],
            "car": [],
            "bird": [],
        },
        "responses": [
            {"id": 1, "response": "puppy cat light dog spoon car"},
            {"id": 2, "response": "car forest"},
            {"id": 3, "response": "No"},
            {"id": 4, "response": "yes"},
        ],
    }
    for name, value in content.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "safe_words.txt").write_text("light\nline")
    return [
        "amber",
        *(f"{name}={tmp_path / f'{name}.json'}" for name in content),
        f"safe_words={tmp_path / 'safe_words.txt'}",
    ]


STAND_INS = ("nouns=relation", "similarity=equality")


def test_chair_prints_one_json_object(chair):
    printed = json.loads(evaluate(*chair, "--json"))
    assert printed["chair_i"] == pytest.approx(100 / 3)
    assert printed["chair_s"] == 50
    assert printed["recall"] == pytest.approx(200 / 3)
    assert printed["mean_length"] == 3.5
    assert (printed["repetition_i"], printed["repetition_s"]) == (0, 0)
    assert {"chair_i", "chair_s", "recall", "mean_length"} < set(printed["intervals"])
    low, high = (printed["intervals"]["chair_s"][end] for end in ("low", "high"))
    assert 0 <= low <= 50 <= high <= 100
    assert (printed["tokeniser"], printed["singulariser"]) == ("rules", "rules")
    assert printed["left_out"] == {
        "captions of images without objects": {"count": 1, "first": ["77"]},
        "images without a caption": {"count": 1, "first": ["9"]},
    }


def test_the_table_shows_recall_and_length_next_to_hallucination_and_what_is_next(chair):
    said = evaluate(*chair)
    for expected in ("CHAIR-i", "CHAIR-s", "recall", "mean length", "95% interval", "Next:"):
        assert expected in said
    assert "1 captions of images without objects: 77" in said
    assert "tokeniser: rules" in said


def test_details_list_every_caption(chair, tmp_path):
    details = tmp_path / "new" / "details.jsonl"
    assert str(details) in evaluate(*chair, f"details={details}").replace("\n", "")
    first, second = map(json.loads, details.read_text().splitlines())
    assert (first["mentions"], first["hallucinated"]) == (["dog", "cat"], ["cat"])
    assert (second["image_id"], second["missed"]) == ("2", ["cat"])


def test_captions_of_other_images_are_refused(chair, tmp_path):
    (tmp_path / "objects.json").write_text('{"5": ["dog"]}')
    with pytest.raises(DataError, match=r"none of its 3 images: it has 5, .* are about 1, 2, 77"):
        evaluate(*chair)


def test_pope_gives_the_mean_over_splits_and_each_split(pope):
    printed = json.loads(evaluate(*pope, "--json"))
    assert printed["parts"]["random"]["accuracy"] == 100
    assert printed["parts"]["popular"]["accuracy"] == 50
    assert printed["accuracy"] == 75
    assert printed["yes_ratio"] == 75
    assert printed["counts"]["questions"] == 4
    assert printed["left_out"]["questions of random without a response"] == {
        "count": 1,
        "first": ["3"],
    }


def test_pope_takes_a_single_file(pope):
    single = [argument.replace(".random=", "=") for argument in pope if ".popular" not in argument]
    printed = json.loads(evaluate(*single, "--json"))
    assert printed["accuracy"] == 100
    assert "parts" not in printed


def test_questions_and_responses_of_different_splits_are_refused(pope):
    with pytest.raises(
        ConfigError, match="must name the same splits, got random, popular and rand"
    ):
        evaluate(*pope[:-1])


def test_amber_gives_the_worked_example_and_names_its_stand_ins(amber):
    printed = json.loads(evaluate(*amber, *STAND_INS, "--json"))
    assert [printed[name] for name in ("chair", "cover", "hal", "cog")] == [33.3, 75.0, 50.0, 33.3]
    assert printed["accuracy"] == 50.0  # "yes" is not exactly "Yes"
    assert printed["amber_score"] == pytest.approx((100 - 33.3 + printed["f1"]) / 2)
    assert "relation.json (stand-in)" in printed["nouns"]
    assert printed["similarity"] == "equality (stand-in)"
    assert set(printed["parts"]) == {"existence", "attribute", "state"}
    assert printed["left_out"]["questions without a response"] == {"count": 1, "first": ["5"]}
    assert any("not with papers" in note for note in printed["notes"])
    assert "resamples of responses" in printed["interval"]


def test_responses_about_one_image_are_resampled_together(amber, tmp_path):
    queries = [{"id": i, "image": "one.jpg", "query": "?"} for i in range(1, 6)]
    (tmp_path / "queries.json").write_text(json.dumps(queries))
    more = (*STAND_INS, f"queries=[{tmp_path / 'queries.json'}]", "--json")
    printed = json.loads(evaluate(*amber, *more))
    assert "resamples of images" in printed["interval"]
    assert printed["intervals"]["chair"] is None  # there is only one


def test_yes_and_no_alone_ask_for_no_language_data(amber, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    (tmp_path / "responses.json").write_text('[{"id": 3, "response": "No"}]')
    printed = json.loads(evaluate(*amber, "--json"))
    assert printed["accuracy"] == 99.9  # 1 of 1.001
    assert "chair" not in printed


def test_descriptions_without_language_data_say_how_to_get_it(amber, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffalign\[language\]'; .*nouns=relation"):
        evaluate(*amber)


def test_saved_responses_are_judged_without_torch(chair):
    code = (
        "import sys; from diffalign.cli import app; app(standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "evaluate", *chair, FEW, "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report, loaded = printed.splitlines()
    assert json.loads(report)["chair_i"] > 0
    assert loaded == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chiar"], r"kinds: .*chair.*Did you mean chair\?"),
        (["chair"], "objects, synonyms must be given"),
        (["chair", "objects=a", "synonyms=b"], "give either captions=FILE .* or a model to ask"),
        (["chair", "caption=x"], "caption is not a field of Chair.*Did you mean captions"),
        (["pope", "questions=a", "responses.random=b"], "must name the same splits"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(*arguments)


@pytest.fixture
def halbench(tmp_path) -> list[str]:
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat, kitten\n")
    (tmp_path / "objects.json").write_text('{"1": ["dog"], "2": ["cat"], "3": ["dog"]}')
    responses = lines(
        tmp_path / "responses.jsonl",
        {"image_id": 1, "question": "What is there?", "answer": "There are dogs and a cat."},
        {"image_id": 2, "question": "What is there?", "answer": "A cat"},
        {"image_id": 3, "question": "What is there?", "answer": "Nothing but a garbled reply."},
    )
    return [
        "object_halbench",
        f"responses={responses}",
        f"objects={tmp_path / 'objects.json'}",
        f"synonyms={tmp_path / 'synonyms.txt'}",
    ]


def judged_by(server, tmp_path) -> list[str]:
    return [
        "judge.kind=endpoint",
        f"judge.address={server.address}",
        "judge.model=tiny",
        f"verdicts={tmp_path / 'verdicts.jsonl'}",
    ]


def test_object_halbench_by_a_judge(halbench, tmp_path):
    def reply(prompt: str) -> str:
        assert "What is there?" in prompt
        return "I cannot" if "garbled" in prompt else '["dogs", "cat"]'

    with serving(reply) as server:
        arguments = [*halbench, *judged_by(server, tmp_path), "lemmas=rules", "--json"]
        printed = json.loads(evaluate(*arguments))
        asked = len(server.requests)
        assert json.loads(evaluate(*arguments, "attempts=1")) == printed
        assert len(server.requests) == asked + 1  # the unreadable one alone
    assert asked == 1 + 3  # a short response is not asked about, an unreadable one three times
    assert (printed["response_level"], printed["mention_level"]) == (100, 50)
    assert printed["counts"]["answers"] == 2
    assert printed["objects_from"] == "tiny"
    assert printed["template"] == "own wording"
    assert printed["lemmas"] == "rules (stand-in)"
    assert printed["left_out"]["responses whose list of objects could not be read"] == {
        "count": 1,
        "first": ["3"],
    }


def test_object_halbench_without_a_judge_names_its_stand_in(halbench):
    printed = json.loads(evaluate(*halbench, "--json"))
    assert printed["mention_level"] == pytest.approx(100 / 3)
    assert printed["objects_from"] == "words of the responses (stand-in)"
    stand_in, silent, *_ = printed["notes"]
    assert stand_in == "Without a judge the figures are not those of papers."
    assert silent.startswith("1 of 3 responses claim no object of COCO")


def test_a_judge_needs_a_file_for_its_verdicts(halbench):
    with pytest.raises(ConfigError, match="judge and verdicts go together"):
        evaluate(*halbench, "verdicts=x")


def test_mmhal_by_a_judge(tmp_path):
    items = [
        {
            "image_content": ["Dog"],
            "question": f"Question {n}?",
            "gt_answer": "A dog.",
            "model_answer": "A brown dog.",
        }
        for n in range(9)
    ]
    (tmp_path / "items.json").write_text(json.dumps(items))
    (tmp_path / "template.txt").write_text("{} | {} | {} | {}")
    seen = []

    def reply(prompt: str) -> str:
        seen.append(prompt)
        return {"Question 0?": "Rating: 6", "Question 1?": "none"}.get(
            prompt.split(" | ")[1], "Rating: 2"
        )

    with serving(reply) as server:
        arguments = [
            "mmhal",
            f"items={tmp_path / 'items.json'}",
            f"template={tmp_path / 'template.txt'}",
            *judged_by(server, tmp_path),
            "--json",
        ]
        printed = json.loads(evaluate(*arguments))
        assert json.loads(evaluate(*arguments)) == printed
    assert len(seen) == 9  # the second run asked nothing
    assert "Dog | Question 3? | A dog. | A brown dog." in seen
    assert printed["score"] == pytest.approx((6 + 0 + 7 * 2) / 9)
    assert printed["hallucination_rate"] == pytest.approx(100 * 8 / 9)
    assert printed["parts"]["attribute"]["score"] == 4  # items 0 and 8
    assert any("1 replies of the judge name no rating" in note for note in printed["notes"])
    assert "9 of 96 published questions." in printed["notes"]


NUMBERS = [1, 1.0, "1", "000000000001", "000000000001.jpg", "COCO_val2014_000000000001.jpg"]


@pytest.mark.parametrize("image_id", NUMBERS)
@pytest.mark.parametrize("key", ["image_id", "image"])
def test_ids_of_coco_are_understood_in_every_spelling(chair, halbench, image_id, key, tmp_path):
    known = "COCO_train2014_000000000001.jpg"
    (tmp_path / "objects.json").write_text(json.dumps({known: ["dog"], "2": []}))
    said = {key: image_id, "caption": "A dog and a cat.", "question": "What is there?"}
    for arguments, name in ((chair, "captions"), (halbench, "answers")):
        lines(tmp_path / f"{name}.jsonl", said)
        printed = json.loads(evaluate(*arguments, "--json"))
        assert printed["counts"]["objects_found"] == 1
        assert not printed["left_out"].get("captions of images without objects", {"count": 0})[
            "count"
        ]


def test_responses_of_pope_meet_their_questions_in_any_spelling(pope, tmp_path):
    for split in ("random", "popular"):
        rows = [{"question_id": f"{n:06d}", "answer": "Yes"} for n in (1, 2, 3)]
        lines(tmp_path / f"a_{split}.json", *rows)
    assert json.loads(evaluate(*pope, "--json"))["counts"]["questions"] == 6


def test_responses_to_other_questions_show_the_ids_that_exist(pope, tmp_path):
    lines(tmp_path / "a_random.json", {"question_id": "x", "answer": "Yes"})
    with pytest.raises(DataError, match="the questions have 1, 2, 3; give"):
        evaluate(*pope)


def test_responses_to_other_items_of_amber_show_the_ids_that_exist(amber, tmp_path):
    (tmp_path / "responses.json").write_text('[{"id": 99, "response": "No"}]')
    with pytest.raises(DataError, match="example 99; the annotations have 1 to 5"):
        evaluate(*amber, *STAND_INS)


def notes(*arguments: str) -> str:
    return "\n".join(json.loads(evaluate(*arguments, "--json"))["notes"])


def test_empty_responses_of_pope_are_said_to_be_empty(pope, tmp_path):
    for split in ("random", "popular"):
        rows = [{"question_id": n, "answer": " " * (n - 1)} for n in (1, 2, 3)]
        lines(tmp_path / f"a_{split}.json", *rows)
    said = notes(*pope)
    assert "6 of 6 responses are EMPTY. The figures say nothing about a model." in said
    assert "6 of 6 responses say neither yes nor no and count as yes, as published" in said
    assert "would leave 0 right: accuracy 0.0 %" in said
    assert "answered with yes 100.0" in said  # at an end of its scale
    assert "EMPTY" in evaluate(*pope)


def test_responses_that_say_neither_are_said_and_others_are_not(pope, tmp_path):
    assert "neither" not in notes(*pope)
    rows = [{"question_id": n, "answer": a} for n, a in ((1, "Yes"), (2, "A dog."), (3, "NO"))]
    lines(tmp_path / "a_random.json", *rows)
    said = notes(*pope)
    assert "1 of 5 responses say neither" in said and "3 right: accuracy 60.0 %" in said
    assert "1 responses say no in letters that the published rule does not know" in said
    assert "EMPTY" not in said


def test_captions_without_an_object_are_said_to_be_that(chair, tmp_path):
    captions = [{"image_id": n, "caption": text} for n, text in ((1, ""), (2, "Hm."))]
    lines(tmp_path / "captions.jsonl", *captions)
    said = notes(*chair)
    assert "1 of 2 captions are EMPTY" in said.replace("responses", "captions")
    assert "2 of 2 captions mention no object" in said
    assert "At an end of the scale: CHAIR-s, captions that hallucinate 0.0" in said
    assert "Undefined, since nothing was there to count: CHAIR-i" in said


def test_a_perfect_score_is_said_to_be_at_the_end_of_its_scale(pope, tmp_path):
    for split in ("random", "popular"):
        rows = [{"question_id": n, "answer": a} for n, a in ((1, "Yes"), (2, "No"), (3, "No"))]
        lines(tmp_path / f"a_{split}.json", *rows)
    assert "At an end of the scale: accuracy 100.0 (" in notes(*pope)


def test_descriptions_without_an_object_are_said_to_be_that(amber, tmp_path):
    rows = [{"id": 1, "response": ""}, {"id": 2, "response": "spoon"}, {"id": 3, "response": ""}]
    (tmp_path / "responses.json").write_text(json.dumps(rows))
    said = notes(*amber, *STAND_INS)
    assert "2 of 3 responses are EMPTY." in said
    assert "2 of 2 descriptions name no object" in said
    assert "1 of 1 responses are neither exactly Yes nor exactly No" in said


def second(pope, tmp_path) -> list[str]:
    """Another model's responses to the same questions."""
    changes = []
    for split in ("random", "popular"):
        rows = [{"question_id": n, "answer": "No, there is none"} for n in (1, 2, 3)]
        file = lines(tmp_path / f"b_{split}.json", *rows)
        changes.append(f"also.aligned.responses.{split}={file}")
    return [*pope, "called=base", *changes]


def test_several_models_stand_in_one_table(pope, tmp_path):
    said = evaluate(*second(pope, tmp_path))
    table = said[said.index("pope, differences to base") :]
    for expected in ("accuracy", "aligned", "95% interval", "paired by images", "Holm"):
        assert expected in table
    assert "Next:" not in said


def test_differences_of_several_models_are_in_the_json(pope, tmp_path):
    printed = json.loads(evaluate(*second(pope, tmp_path), "--json"))
    assert printed["first"] == "base"
    accuracy = {name: of["accuracy"] for name, of in printed["models"].items()}
    assert accuracy["base"] == 75
    assert accuracy["aligned"] == pytest.approx(100 * 2 / 3)
    found = printed["differences"]["aligned"]["recall"]
    assert found["value"] == -100  # it never says yes
    assert 0 <= found["p_value"] <= found["holm"] <= 1
    # The base left question 3 out, so its image is in no difference.
    assert "have 2 images in common" in printed["notes"][0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["also.first.responses=x"], "also.first: the first model is called so; set called=NAME"),
        (["details=d", "also.b.suffix=x"], "also.b: writes d, as first does; give it a file"),
        (["also.b.response=x"], "also.b: response is not a field of Pope.*Did you mean responses"),
    ],
)
def test_settings_of_further_models_that_do_not_work_are_refused(pope, more, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(*pope, *more)
