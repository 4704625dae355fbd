"""The check job whole: what it reads, what it writes, how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from diffalign import cli, config
from diffalign.errors import ConfigError, DataError
from diffalign.jobs import check
from tests.checking.planted import clean_rows, noise_image, png, write
from tests.data.responses.formats.forms import write_lines
from tests.layouts import WRITERS, make_pairs


def responses(count: int) -> list[dict]:
    """Sound ones; every second chosen response is the longer one."""
    return [
        {
            "prompt": f"What is in image {n}?",
            "chosen": f"thing {n}" + " and more" * (n % 2),
            "rejected": f"nothing {n}" + " and more" * (1 - n % 2),
            "image": f"{n}.png",
        }
        for n in range(count)
    ]


def write_responses(folder: Path, rows: list[dict]) -> Path:
    """With images that do not look alike."""
    file = write_lines(folder, rows)
    for n in range(10):
        (folder / f"{n}.png").write_bytes(png(noise_image(n)))
    return file


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["diffalign", "check", *map(str, arguments), "workers=0"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out, " ".join(captured.err.split())


@pytest.fixture
def planted(tmp_path):
    rows = clean_rows(40)
    rows[3]["jpg_1"] = rows[3]["jpg_0"]
    rows[5]["nsfw"] = True
    return write(tmp_path / "pairs", rows)


def test_it_ends_with_1_where_something_was_found(planted, tmp_path, monkeypatch, capsys):
    out = f"output={tmp_path / 'out'}"
    status, said, _ = run(monkeypatch, capsys, planted, out)
    assert status == 1 and "1 harmful and 1 doubtful findings in 40 rows." in said
    assert "harmful 1 of 40 pairs shows the same image on both sides, such as row-00000003" in said
    no_pair = "without=[identical_sides]"
    assert run(monkeypatch, capsys, planted, out, no_pair)[0] == 1
    assert run(monkeypatch, capsys, planted, out, no_pair, "fail_on=harmful")[0] == 0
    assert run(monkeypatch, capsys, planted, out, "fail_on=never")[0] == 0
    status, said, _ = run(monkeypatch, capsys, planted, out, "without=[identical_sides, safety]")
    assert status == 0 and "Nothing was found in 40 rows." in said


def test_it_prints_one_object_for_programs(planted, tmp_path, monkeypatch, capsys):
    status, said, _ = run(monkeypatch, capsys, planted, "--json", f"output={tmp_path / 'out'}")
    printed = json.loads(said)
    assert status == 1
    assert printed == json.loads((tmp_path / "out/check.json").read_text())
    first = printed["findings"][0]
    assert first["name"] == "identical_sides" and first["rows"] == ["row-00000003"]
    won = printed["checks"]["position"]["figures"]["first image won"]
    assert won["value"] == 0.5 and won["of"] == 40 and won["low"] < 0.5 < won["high"]


def test_the_page_holds_its_images_and_asks_for_nothing(planted, tmp_path, monkeypatch, capsys):
    run(monkeypatch, capsys, planted, f"output={tmp_path / 'out'}")
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # both sides of the pair; flagged rows are not
    assert "http" not in page.replace("http-equiv", "")
    assert "shows the same image on both sides" in page and "prompt number 3" in page


def test_a_saved_check_is_repeated(planted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    settings = f"output={out}", "checks=[{kind: safety, threshold: 1}]", "images=none"
    run(monkeypatch, capsys, planted, *settings)
    again = check.load(str(out / "check.yaml"))
    assert again == check.load(str(planted), [*settings, "workers=0"])
    assert again.chosen("images")["safety"].threshold == 1
    assert f"diffalign check {out / 'check.yaml'}" in (out / "report.html").read_text()


def test_responses_are_recognised_and_checked(tmp_path, monkeypatch, capsys):
    rows = responses(10)
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3]["chosen"] = "  "
    rows[4]["image"] = "gone.png"
    rows.append(dict(rows[6]))
    file = write_responses(tmp_path / "data", rows)
    status, said, _ = run(monkeypatch, capsys, file, "--json", f"output={tmp_path / 'out'}")
    found = {each["name"]: each["count"] for each in json.loads(said)["findings"]}
    assert status == 1
    assert found == {
        "unusable_identical": 1,
        "unusable_empty_response": 1,
        "missing_images": 1,
        "repeated_rows": 1,
    }
    page = (tmp_path / "out/report.html").read_text()
    assert "What is in image 6?" in page and "data:image/png" in page


def test_clean_responses_have_no_finding(tmp_path, monkeypatch, capsys):
    file = write_responses(tmp_path / "data", responses(10))
    status, said, _ = run(monkeypatch, capsys, file, f"output={tmp_path / 'out'}")
    assert status == 0 and "Nothing was found in 10 rows." in said


def test_texts_of_two_sides_are_no_images(tmp_path):
    texts = [{"prompt": "Say hello.", "chosen": "hello", "rejected": "bye"}]
    assert check.load(str(write_lines(tmp_path / "texts", texts))).responses is not None
    images = WRITERS["jsonl"](tmp_path / "images", make_pairs(2))
    assert check.load(str(images)).data is not None
    for file in (images / "images").iterdir():
        file.unlink()  # names of images that are gone are still those of images
    assert check.load(str(images)).data is not None


def run_config(tmp_path, **sections) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output": "runs/x", "model": {"kind": "sd15"}, **sections}))
    return str(path)


def test_the_data_of_a_training_config_is_taken(planted, tmp_path):
    path = run_config(tmp_path, data={"path": str(planted), "resolution": 64, "ties": "keep"})
    taken = check.load(path, ["data.limit=7", "images=all"])
    assert taken.data is not None and taken.data.resolution == 64 and taken.data.limit == 7
    assert taken.images == "all" and str(taken.output) == "runs/check"
    assert str(check.load(path, ["output=here"]).output) == "here"
    with pytest.raises(ConfigError, match=r"model is not a field of CheckConfig"):
        check.load(path, ["model.path=x"])


def test_a_run_without_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither data nor responses: a run that samples every"):
        check.load(run_config(tmp_path, rollouts={"kind": "d3po"}))


def test_small_images_are_those_below_the_resolution_of_the_run(planted, tmp_path):
    path = run_config(tmp_path, data={"path": str(planted), "resolution": 64})
    settings = ["workers=0", f"output={tmp_path / 'out'}"]
    report = check.run(check.load(path, settings))
    assert "small_images" in {finding.name for finding in report.findings}


def test_no_more_rows_than_the_limit_are_looked_at(planted, tmp_path):
    settings = ["workers=0", f"output={tmp_path / 'out'}"]
    assert len(check.run(check.load(str(planted), [*settings, "limit=3"])).data.rows) == 3
    assert len(check.run(check.load(str(planted), [*settings, "data.limit=4"])).data.rows) == 4


def shared(report) -> dict[str, int]:
    figures = report.outcomes["shared_prompts"].figures
    return {name.removeprefix("shared with "): value for name, value in figures.items()}


def test_prompts_are_compared_with_other_data_and_files_of_prompts(tmp_path):
    train = write(tmp_path / "train", clean_rows(20))
    other = WRITERS["folder"](tmp_path / "other", make_pairs(3))
    (other / "win/0001.txt").write_text("Prompt number 4.")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("prompt number 5\nprompt NUMBER 6\nanother\n")
    settings = ["workers=0", f"output={tmp_path / 'out'}", f"against=[{other}, {prompts}]"]
    assert shared(check.run(check.load(str(train), settings))) == {str(other): 1, str(prompts): 2}


def test_a_holdout_that_knows_a_prompt_in_another_spelling(tmp_path):
    rows = clean_rows(40)
    for row in rows[20:]:
        row["caption"] = rows[int(row["caption"].split()[-1]) - 20]["caption"].upper()
    train = write(tmp_path / "train", rows)
    settings = ["workers=0", f"output={tmp_path / 'out'}", "data.holdout=0.5"]
    found = shared(check.run(check.load(str(train), settings)))
    assert list(found) == ["data.holdout"] and 3 < found["data.holdout"] < 17


def test_a_check_of_ones_own_is_run(planted, tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text(
        "from dataclasses import dataclass\n"
        "from diffalign.checking.checks.base import AbstractCheck, Outcome\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Loud(AbstractCheck):\n"
        "    title = 'Loud prompts'\n"
        "    def look(self, data):\n"
        "        return Outcome(figures={'loud': sum(r.prompt.isupper() for r in data.rows)})\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = ["workers=0", f"output={tmp_path / 'out'}", "checks=[{kind: ./loud.py}]"]
    report = check.run(check.load(str(planted), settings))
    assert any(outcome.figures == {"loud": 0} for outcome in report.outcomes.values())


def test_bad_settings_are_refused(planted, tmp_path):
    for override, said in [
        ("without=[positoin]", r"without names 'positoin' \(checks: .*\)\. Did you mean position"),
        ("fail_on=sometimes", "fail_on must be one of any, harmful, never, got 'sometimes'"),
        ("images=few", "images must be one of all, sample, none"),
        ("sample=0", "sample must be at least 1, got 0"),
        ("checks=[{kind: position, tolerance: 2}]", "tolerance must be between 0 and 0.5, got 2"),
        ("responses.path=x", "give data or responses"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check.load(str(planted), [override, f"data.path={planted}"])


def test_what_cannot_be_checked_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="check needs a data set or the config of a training run"):
        check.load(None)
    with pytest.raises(DataError, match=r"data\.path .*nothing does not exist"):
        check.load(str(tmp_path / "nothing"))
    write_lines(tmp_path / "odd", [{"question": "a", "reply": "b"}])
    with pytest.raises(DataError, match="neither as image pairs nor as responses") as error:
        check.load(str(tmp_path / "odd"))
    assert "- as image pairs:" in str(error.value) and "- as responses:" in str(error.value)
    with pytest.raises(ConfigError, match="there is no such config file"):
        check.load(str(tmp_path / "none.yaml"))


def test_data_without_a_row_is_refused(tmp_path):
    (tmp_path / "win").mkdir()
    (tmp_path / "lose").mkdir()
    with pytest.raises(DataError, match="there is no row in it"):
        check.run(check.load(str(tmp_path), ["workers=0", f"output={tmp_path / 'out'}"]))


def test_settings_of_a_check_load_from_a_file(tmp_path, planted):
    file = tmp_path / "check.yaml"
    file.write_text(yaml.safe_dump({"data": {"path": str(planted), "resolution": 8}, "limit": 2}))
    assert check.load(str(file), ["limit=5"]).limit == 5
    config.save(check.load(str(file)), file)
    assert check.load(str(file)).limit == 2
