from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign import components
from diffalign.data.decoding import decode
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.conversation import Comparison
from diffalign.data.responses.formats.base import AbstractMapping
from diffalign.data.responses.reading import open_responses
from diffalign.data.responses.records import ResponsePair, Turn
from diffalign.data.skipping import LeftOut
from diffalign.errors import ConfigError, DataError
from tests.data.responses.formats import forms
from tests.data.responses.formats.forms import FORMS, UNPAIRED, tiny_png, write_lines, write_list

TESTS = Path(forms.__file__).parent


def opened(path, **settings):
    return open_responses(ResponseConfig(path=str(path), **settings))


def pairs_in(path, **settings):
    data = opened(path, **settings)
    return [
        data.pair(number, place)
        for number, found in enumerate(data.without_images())
        for place, comparison in enumerate(found)
        if not isinstance(comparison, LeftOut)
    ]


def first_pair(folder, row, **settings) -> ResponsePair:
    (pair,) = pairs_in(write_lines(folder, [row]), **settings)
    assert isinstance(pair, ResponsePair), pair
    return pair


def without_white_space(text):
    return "".join(text.split())


def test_every_form_has_a_row_here_or_a_test_of_its_own():
    with_own = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert {*FORMS, *UNPAIRED} <= set(components.kinds(AbstractMapping))
    assert {*FORMS, *UNPAIRED, *with_own} >= set(components.kinds(AbstractMapping))


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("write", [write_lines, write_list])
def test_a_form_is_recognised_and_read_in_order(kind, write, tmp_path):
    file = write(tmp_path / "set", [FORMS[kind](i) for i in range(3)])
    assert f"read as {kind}: " in opened(file).summary
    for i, pair in enumerate(pairs_in(tmp_path / "set")):
        assert pair.sample_id == f"pairs.jsonl:{i + 1}" or pair.sample_id == f"pairs.json[{i}]"
        assert [turn.role for turn in pair.turns] == ["user"]
        prompt = without_white_space(pair.turns[0].text)
        images = 2 if kind == "mia_dpo" else 1
        assert prompt.endswith(f"hatis{i}?")
        assert prompt.count("<image>") == len(pair.images) == images
        assert "ASSISTANT" not in prompt and "curious" not in prompt
        assert pair.responses["chosen"] == f"It is {i}."
        assert pair.responses["rejected"] == f"It is not {i}."
        assert decode(pair.images[0], max_pixels=100).getpixel((3, 0)) == (200 - i, i, 0)


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_may_be_named(kind, tmp_path):
    file = write_lines(tmp_path, [FORMS[kind](0)])
    assert type(opened(file, kind=kind).mapping) is type(opened(file).mapping)


def test_a_form_that_does_not_fit_is_refused_with_what_it_needs(tmp_path):
    file = write_lines(tmp_path, [forms.trl(0)])
    with pytest.raises(DataError, match=r"columns images, prompt, chosen, rejected fit no") as info:
        opened(file, kind="re_align")
    assert "re_align: chosen, rejected, retrieved_image and image (or images)" in str(info.value)


def test_columns_that_fit_no_form_are_refused_with_all_forms(tmp_path):
    file = write_lines(tmp_path, [{"picture": "a.png", "caption": "x"}])
    with pytest.raises(DataError, match=r"columns picture, caption fit no form") as info:
        opened(file)
    for kind in FORMS:
        assert f"\n  {kind}: " in str(info.value)


def test_captions_are_no_rlhf_v(tmp_path):
    file = write_lines(tmp_path, [{"image": "0.png", "text": "a caption"}])
    with pytest.raises(DataError, match="fit no form"):
        opened(file)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"pairs.jsonl: 1 jsonl file: there is no row in it"):
        opened(write_lines(tmp_path, []))


def test_a_folder_of_images_alone_is_refused(tmp_path):
    write_lines(tmp_path, []).unlink()
    message = r"is a folder without .parquet, .arrow, .jsonl, .json files\. It holds: 0.png"
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_json_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "pairs.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"pairs.json holds a dict, expected a list of objects"):
        opened(tmp_path)
    (tmp_path / "pairs.json").write_text('{"a": 1}\n{"a": 2}')
    with pytest.raises(DataError, match=r"one object a line is named .jsonl"):
        opened(tmp_path)


def test_columns_may_have_other_names(tmp_path):
    row = forms.rlaif_v(1)
    row["better"], row["worse"] = row.pop("chosen"), row.pop("rejected")
    pair = first_pair(tmp_path, row, columns={"chosen": "better", "rejected": "worse"})
    assert pair.responses == {"chosen": "It is 1.", "rejected": "It is not 1."}


def test_a_column_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    file = write_lines(tmp_path, [forms.rlaif_v(0)])
    message = (
        r"responses.columns.chosen is chosn, and the data set has ds_name.*Did you mean chosen"
    )
    with pytest.raises(DataError, match=message):
        opened(file, columns={"chosen": "chosn"})


@pytest.mark.parametrize(
    "value", ["images/0.JPG", ["0.png"], {"bytes": None, "path": "0.png"}, "iVBORw0KGgoAAAA="]
)
def test_a_column_of_images_that_nobody_would_read_is_refused(value, tmp_path):
    row = {"picture": value, "prompt": "What?", "chosen": "a", "rejected": "b"}
    file = write_lines(tmp_path, [row])
    message = r"trl takes images from images or image.*columns='\{image: picture\}'"
    with pytest.raises(ConfigError, match=message):
        opened(file)
    assert opened(file, columns={"image": "picture"}).summary.endswith("images from image")


def test_text_alone_may_have_other_columns(tmp_path):
    row = {"source": "a.b", "prompt": "What is in a.png?", "chosen": "a", "rejected": "b"}
    assert opened(write_lines(tmp_path, [row])).summary.endswith("no column of images")


def test_images_start_from_the_image_folder_if_there_is_one(tmp_path):
    row = {**forms.povid(0), "image": "coco/0.png"}
    pair = first_pair(tmp_path, row, image_folder=str(tmp_path / "pictures"))
    assert pair.images == (tmp_path / "pictures" / "coco" / "0.png",)
    assert first_pair(tmp_path, row).images == (tmp_path / "coco" / "0.png",)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"responses\.kind: there is no 'povidd'.*mean povid"):
        opened(write_lines(tmp_path, [forms.povid(0)]), kind="povidd")


def save_table(folder, rows, image_feature):
    """Parquet as the datasets library writes it, with images in the column of images."""
    data = datasets.Dataset.from_list(rows)
    for name, feature in image_feature.items():
        data = data.cast_column(name, feature)
    folder.mkdir()
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def test_parquet_with_lists_of_images_is_read_undecoded(tmp_path):
    rows = [{**forms.trl(i), "images": [{"bytes": tiny_png(i), "path": None}]} for i in range(3)]
    folder = save_table(tmp_path / "set", rows, {"images": datasets.Sequence(datasets.Image())})
    pairs = pairs_in(folder)
    assert [pair.images for pair in pairs] == [(tiny_png(i),) for i in range(3)]
    assert pairs[1].turns == (Turn(role="user", text="<image>What is 1?"),)
    assert [pair.sample_id for pair in pairs] == [f"row-{i:08d}" for i in range(3)]


def test_parquet_with_one_image_a_row(tmp_path):
    rows = [{**forms.rlaif_v(i), "image": {"bytes": tiny_png(i), "path": "x"}} for i in range(2)]
    folder = save_table(tmp_path / "set", rows, {"image": datasets.Image()})
    assert [pair.images for pair in pairs_in(folder)] == [(tiny_png(0),), (tiny_png(1),)]


def test_plain_parquet_with_bytes(tmp_path):
    rows = [{**forms.rlhf_v(i), "image": tiny_png(i)} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [pair.images for pair in pairs_in(tmp_path)] == [(tiny_png(0),), (tiny_png(1),)]


def test_a_folder_that_the_datasets_library_saved(tmp_path):
    saved = datasets.Dataset.from_list([forms.opa_dpo(i) for i in range(2)])
    saved.save_to_disk(str(tmp_path / "set"))
    pairs = pairs_in(tmp_path / "set")
    assert [pair.images for pair in pairs] == [(tiny_png(0),), (tiny_png(1),)]
    assert [pair.responses["chosen"] for pair in pairs] == ["It is 0.", "It is 1."]


def test_completions_as_lists_of_fields(tmp_path):
    """So the hub's copy of VLFeedback comes out of the datasets library."""
    row = forms.vlfeedback(0)
    fields = row["completions"][0]
    row["completions"] = {name: [c[name] for c in row["completions"]] for name in fields}
    assert first_pair(tmp_path, row).responses["chosen"] == "It is 0."


def test_images_of_tables_are_not_read_for_the_index(tmp_path, monkeypatch):
    rows = [{**forms.rlaif_v(0), "image": {"bytes": b"no image", "path": "x"}}]
    folder = save_table(tmp_path / "set", rows, {"image": datasets.Image()})
    data = opened(folder)
    asked = []
    scan = type(data.rows).scan
    monkeypatch.setattr(
        type(data.rows), "scan", lambda self, columns: asked.append(columns) or scan(self, columns)
    )
    ((comparison,),) = data.without_images()
    assert isinstance(comparison, Comparison)
    assert "question" in asked[0] and "image" not in asked[0]


def test_a_hub_data_set_is_loaded_by_id_split_and_revision(monkeypatch):
    asked = {}

    def load(path, **arguments):
        asked.update(arguments, path=path)
        return datasets.Dataset.from_list([{**forms.rlaif_v(0), "image": tiny_png()}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = opened("openbmb/RLAIF-V-Dataset", split="test", revision="abc")
    assert asked == {
        "path": "openbmb/RLAIF-V-Dataset",
        "split": "test",
        "revision": "abc",
        "streaming": False,
    }
    assert data.summary.startswith("openbmb/RLAIF-V-Dataset on the hub, read as rlaif_v: ")
    assert data.fingerprint == "openbmb/RLAIF-V-Dataset@abc"
    assert data.pair(0, 0).images == (tiny_png(),)
