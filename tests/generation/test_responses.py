"""Asking a model: what it is shown and told, what is kept, and what a rerun still asks."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign import config
from diffalign.benchmarks.amber.config import Amber
from diffalign.benchmarks.chair.config import Chair
from diffalign.benchmarks.pope.config import Pope
from diffalign.data.decoding import decode
from diffalign.errors import ConfigError, DataError, DiffalignError, ModelError
from diffalign.generation.responses import Asked, Asking, ImageQuestion, ResponsesPlan, ask
from diffalign.models.vlm.config import VLM
from tests.judges import brightness_teller
from tests.judges.brightness_teller import BrightnessTeller
from tests.tiny_vlm import tiny_llava

MODEL = "model.kind=tests.judges.brightness_teller"


@pytest.fixture(autouse=True)
def asked() -> list[str]:
    """The texts that the model was asked, in order."""
    brightness_teller.ASKED.clear()
    return brightness_teller.ASKED


@pytest.fixture
def folder(tmp_path):
    for name, level in (("dark.jpg", 0), ("bright.jpg", 255)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / name)
    return tmp_path


def questions(folder, *names: str) -> list[ImageQuestion]:
    return [ImageQuestion(question_id=n, image=folder / f"{n}.jpg", text="?") for n in names]


def asking(folder, **changes) -> Asking:
    settings = {"images": folder, "saves": folder / "responses.jsonl", "batch_size": 1, **changes}
    return Asking(**settings)


def test_every_question_is_asked_of_its_image(folder):
    responses = ask(BrightnessTeller(), questions(folder, "dark", "bright"), asking(folder))
    assert responses == {"dark": "no light", "bright": "a light"}
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert [(row["image"], row["answer"]) for row in rows] == [
        ("dark.jpg", "no light"),
        ("bright.jpg", "a light"),
    ]


def test_a_system_turn_comes_first_and_makes_other_responses(folder, asked):
    ask(BrightnessTeller(), questions(folder, "dark"), asking(folder, system="Be brief."))
    assert asked == ["system: Be brief. ?"]
    with pytest.raises(ConfigError, match=r"another asking.max_new_tokens, asking.system or"):
        ask(BrightnessTeller(), questions(folder, "dark"), asking(folder))
    assert asking(folder, system="Be brief.").figures_depend_on["system"] == "Be brief."
    assert "system" not in asking(folder).figures_depend_on


def test_a_rerun_asks_only_what_is_missing(folder, asked):
    ask(BrightnessTeller(), questions(folder, "dark"), asking(folder))
    responses = ask(BrightnessTeller(), questions(folder, "dark", "bright"), asking(folder))
    assert responses == {"dark": "no light", "bright": "a light"}
    assert len(asked) == 2


def test_what_was_answered_before_a_failure_is_kept(folder, asked):
    (folder / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken.jpg: cannot be read as an image"):
        ask(BrightnessTeller(), questions(folder, "dark", "broken"), asking(folder))
    ask(BrightnessTeller(), questions(folder, "dark"), asking(folder))
    assert len(asked) == 1


def test_questions_about_an_image_are_asked_together_and_kept_in_their_own_order(
    folder, asked, monkeypatch
):
    decoded = []

    def noted(path):
        decoded.append(path.name)
        return decode(path)

    monkeypatch.setattr("diffalign.generation.responses.decode", noted)
    several = [
        ImageQuestion(question_id=f"{name}{text}", image=folder / f"{name}.jpg", text=text)
        for text in "123"
        for name in ("dark", "bright")
    ]
    said = ask(BrightnessTeller(), several, asking(folder, batch_size=2))
    assert asked == ["1", "2", "3", "1", "2", "3"]
    assert decoded == ["dark.jpg", "bright.jpg"]
    assert list(said) == [question.question_id for question in several]
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert [(row["image"], row["question"]) for row in rows] == [
        (question.image.name, question.text) for question in several
    ]
    assert {row["answer"] for row in rows if row["image"] == "dark.jpg"} == {"no light"}


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1, 1, 2]), (2, [2, 2]), (9, [4])])
def test_images_share_a_batch_where_it_holds_all_that_is_asked_about_them(
    folder, batch_size, batches
):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
    several = [
        ImageQuestion(question_id=f"{name}{text}", image=folder / f"{name}.jpg", text=text)
        for name, text in (("a", "1"), ("b", "1"), ("c", "1"), ("c", "2"))
    ]
    settings = asking(folder, batch_size=batch_size)
    plan = ResponsesPlan(Asked(model=BrightnessTeller(), questions=several, asking=settings))
    assert [block.size for block in plan.blocks] == batches


def test_a_model_that_cannot_share_says_so_once(folder, capsys):
    path = tiny_llava(folder / "model")
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(
        json.dumps({**settings, "no_repeat_ngram_size": 2})
    )
    several = [
        ImageQuestion(question_id=f"{name}{text}", image=folder / f"{name}.jpg", text=text)
        for name in ("dark", "bright")
        for text in "12"
    ]
    ask(
        VLM(path=str(path)),
        several,
        asking(folder, batch_size=2, max_new_tokens=2, device="cpu"),
    )
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("images are computed for each question: the checkpoint's") == 1


def test_another_wording_is_asked_anew(folder, asked):
    ask(BrightnessTeller(), questions(folder, "dark"), asking(folder))
    other = ImageQuestion(question_id="dark", image=folder / "dark.jpg", text="Is it?")
    ask(BrightnessTeller(), [other], asking(folder))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("model", "changes"), [(BrightnessTeller(level=9), {}), (BrightnessTeller(), {"dtype": "bf16"})]
)
def test_responses_of_another_model_are_not_mixed_in(folder, model, changes):
    ask(BrightnessTeller(), questions(folder, "dark"), asking(folder))
    with pytest.raises(ConfigError, match=r"responses of another model.*another file"):
        ask(model, questions(folder, "dark"), asking(folder, **changes))


def test_a_model_that_was_trained_again_in_its_folder_is_another(folder):
    model = VLM(path=str(tiny_llava(folder / "model")))
    settings = asking(folder, max_new_tokens=1, device="cpu")
    ask(model, questions(folder, "dark"), settings)
    (weights,) = (folder / "model").glob("*.safetensors")
    save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="responses of another model"):
        ask(VLM(path=model.path), questions(folder, "dark"), settings)


def test_missing_images_are_counted_before_the_model_is_loaded(folder):
    with pytest.raises(DataError, match=r"2 images .* are missing, for example no.jpg, none.jpg"):
        ask(BrightnessTeller(), questions(folder, "none", "no", "dark"), asking(folder))
    assert not (folder / "responses.jsonl").exists()


def test_a_gpu_that_is_too_small_is_told_in_words(folder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BrightnessTeller, "_generate", full)
    with pytest.raises(
        DiffalignError, match=r"hold 1 questions at once: set asking.batch_size lower"
    ):
        ask(BrightnessTeller(), questions(folder, "dark"), asking(folder))


def test_a_model_that_writes_no_text_is_refused(folder):
    with pytest.raises(ModelError, match="writes no text"):
        ask(BrightnessTeller(mute=True), questions(folder, "dark"), asking(folder))


def load(cls, folder, *overrides: str):
    common = [MODEL, f"asking.images={folder}", f"asking.saves={folder / 'responses.jsonl'}"]
    return config.load(cls, None, [*common, *overrides, "bootstrap.resamples=100"])


def test_pope_of_a_model(folder, asked):
    path = folder / "questions.json"
    path.write_text(
        "".join(
            json.dumps({"question_id": 1, "image": f"{n}.jpg", "text": "Light?", "label": label})
            + "\n"
            for n, label in (("dark", "no"),)
        )
    )
    suffix = "suffix=Response with a single word."
    report = load(Pope, folder, f"questions.a={path}", f"questions.b={path}", suffix).report()
    (text,) = asked  # both splits have the same question
    assert "Light?Response with a single word." in text
    assert report.settings["suffix"] == "Response with a single word."
    assert report.whole.figures["accuracy"].value == 100
    assert report.whole.counts["questions"] == 2


def test_chair_of_a_model(folder, asked):
    Image.new("RGB", (8, 8), "white").save(folder / "COCO_val2014_000000000007.jpg")
    (folder / "synonyms.txt").write_text("light, lamp\n")
    (folder / "objects.json").write_text('{"7": ["light"]}')
    report = load(
        Chair,
        folder,
        f"objects={folder / 'objects.json'}",
        f"synonyms={folder / 'synonyms.txt'}",
        "prompt=What is it?",
    ).report()
    assert report.whole.figures["recall"].value == 100
    assert asked == ["What is it?"]
    assert report.settings["prompt"] == "What is it?"
    assert report.settings["max_new_tokens"] == 512


@pytest.fixture
def amber(folder) -> list[str]:
    """The files of AMBER with one image to describe and one question."""
    (folder / "annotations.json").write_text(
        '[{"id": 1, "type": "generative", "truth": ["light"], "hallu": []},'
        ' {"id": 2, "type": "relation", "truth": "no"}]'
    )
    (folder / "relation.json").write_text('{"light": []}')
    (folder / "safe.txt").write_text("")
    (folder / "queries.json").write_text(
        '[{"id": 1, "image": "bright.jpg", "query": "Describe this image."},'
        ' {"id": 2, "image": "dark.jpg", "query": "Is it lit?"}]'
    )
    return [
        f"annotations={folder / 'annotations.json'}",
        f"relation={folder / 'relation.json'}",
        f"safe_words={folder / 'safe.txt'}",
        f"queries=[{folder / 'queries.json'}]",
    ]


def test_amber_of_a_model(folder, amber, asked):
    report = load(Amber, folder, *amber, "nouns=relation", "similarity=equality").report()
    assert asked == ["Describe this image.", "Is it lit? Please answer yes or no."]
    assert report.whole.figures["cover"].value == 99.9  # 1 of 1.001
    assert report.whole.counts["correct"] == 1  # "no light" was read as No


def test_language_data_is_missed_before_the_model_is_asked(folder, amber, asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ConfigError, match="nouns=nltk needs the package nltk"):
        load(Amber, folder, *amber).report()
    assert not asked


def test_a_real_vision_language_model_answers(folder):
    model = VLM(path=str(tiny_llava(folder / "model")))
    settings = asking(folder, batch_size=2, max_new_tokens=3, device="cpu")
    responses = ask(model, questions(folder, "dark", "bright"), settings)
    assert set(responses) == {"dark", "bright"}
    assert all(isinstance(response, str) for response in responses.values())
