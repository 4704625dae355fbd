"""Every Python file under scripts/ runs, at a small size, as its head says."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import SCRIPTS, forget_accelerate, run_script

ROOT = SCRIPTS.parent
ELSEWHERE = {
    "annotate_playground.py",  # tests/playground/test_annotator.py
    "faults.py",  # tests/faults/test_faults.py
    "make_playground_preferences.py",  # tests/playground/test_configs.py
    "step_accuracy.py",  # the same
    "screenshot_label.py",  # tests/labelling/test_page.py
    "measuring.py",  # imported by others; below
    "pages.py",  # the same
    "peer_models.py",  # imported by bench_peers.py
    "plain_loops.py",  # the same
    "trl_steps.py",  # run by bench_vlm.py
    "shared_jobs.py",  # the same; tests/jobs/test_shared_work.py
    "list_api.py",  # tests/test_generated_pages.py
    "list_settings.py",  # the same
    "plan_table.py",  # tests/training/test_presets.py
}
DPO = "configs/playground/diffusion_dpo.yaml"
SMALL = {
    "fuzz.py": "--cases 5 --only steps",
    "bench_blocks.py": "--items 200 --rounds 1",
    "bench_cache.py": f"{DPO} training.samples_per_device=2 --steps 2 --rounds 1 --pairs 8",
    "bench_check.py": "--tiny --images none",
    "bench_data.py": "--pixels 64 --resolution 32 --pairs 8 --batches 1 --workers 0",
    "bench_rows.py": "--tiny --out OUT",
    "bench_pages.py": "--prompts 4 --models 3 --pixels 64 --rounds 1 --out OUT",
    "bench_evaluation.py": "--tiny",
    "bench_peers.py": "--tiny",
    "bench_plan.py": "--only cached data.resolution=64 data.limit=8",
    "bench_packing.py": "--tiny",
    "bench_scale.py": "--tiny --only batch --only images --only processes",
    "bench_sharding.py": "--tiny",
    "bench_tokens.py": "--words 600 --pairs 1 --width 32",
    "bench_vlm.py": "--tiny" + (f" --trl {sys.executable}" if find_spec("trl") else ""),
    "bench_training.py": f"{DPO} training.samples_per_device=2 data.workers=0 --steps 2",
    "check_best_checkpoint.py": "--steps 4 --checkpoints 2 --prompts 2 --seeds 1 --out OUT",
    "check_health.py": "demo --steps 2 --out OUT",
    "compare_objectives.py": "--trial --only dspo soft scorers --folder OUT",
    "compare_rewards.py": "--trial --only clip pal --folder OUT",
    "compare_text.py": "--trial --only dpo --folder OUT",
    "drill_sdxl.py": "--tiny --full --processes 2",
    "holdout_playground.py": "--steps 2 --limit 60 --samples 4 --out OUT",
    "kill_workers.py": "--kills 1 --items 6 --jobs score",
    "comparison_coverage.py": "pairs --trials 1 --prompts 5",
    "interval_coverage.py": "--trials 3 --resamples 100 --prompts 5 --rates 0.5",
    "long_run.py": "--tiny --out OUT",
    "one_evening.py": "--few --folder OUT",
    "compare_response_rounds.py": "--trial --only grpo_pope --folder OUT",
    "make_playground_questions.py": "--scenes 3 --out OUT",
    "make_playground_responses.py": "--rows 2 --samples 2 --out OUT",
    "make_text_world.py": "--signs 64 --vae-steps 2 --decoder-steps 2 --clean-steps 2 "
    "--noisy-steps 2 --images 2 --items 1 --out OUT",
    "step_gradients.py": "configs/playground/d3po.yaml rollouts.prompts_per_round=24 "
    "rollouts.images_per_prompt=4",
    "scale_model.py": "--folder assets/playground/sdxl --resolution 64 --gpus 1 --gpus 1024",
    "score_tags.py": "--trial --folder OUT",
    "pretrain_playground.py": "--scenes 64 --vae-steps 2 --decoder-steps 2 --clean-steps 2 "
    "--noisy-steps 2 --items 2 --out OUT",
    "pretrain_playground_clip.py": "--scenes 64 --contrastive-steps 2 --preference-steps 2 "
    "--out OUT",
    "pretrain_playground_llava.py": "--scenes 64 --tower-steps 2 --truthful-steps 2 "
    "--annotator-noise-steps 2 --items 2 --out OUT",
}
"""Arguments of each; OUT is a new folder."""
STARTING_MANY = {"bench_blocks.py", "bench_plan.py", "bench_sharding.py", "one_evening.py"}
"""Those whose commands find the libraries loaded."""


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def test_no_script_is_forgotten():
    tested = {
        *SMALL,
        *ELSEWHERE,
        "compare_methods.py",
        "compare_responses.py",
        "update_readme.py",
        "list_modules.py",
    }
    assert {path.name for path in SCRIPTS.glob("*.py")} == tested


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_script_runs_at_a_small_size(script, tmp_path, capsys, python, monkeypatch):
    if script in STARTING_MANY:
        monkeypatch.setattr(sys, "executable", python)
    out = tmp_path / "out"
    run_script(script, *SMALL[script].replace("OUT", str(out)).split())
    forget_accelerate()
    assert capsys.readouterr().out
    assert out.exists() == ("OUT" in SMALL[script])


@pytest.mark.slow
def test_the_plan_of_a_run_on_responses_is_held_against_its_peak(capsys):
    way = "Qwen2.5-VL, LoRA, repeated rows"
    small = "--rows 384 --pairs 8 training.optimizer_steps=1"
    run_script("bench_plan.py", "--responses", "--only", way, *small.split())
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| {way} | ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("power --trials 40 --many 500 --samples 20000", "(median, tenth"),
        ("looks --trials 40", "40 simulated comparisons"),
    ],
)
def test_what_a_comparison_promises_is_simulated(arguments, said, capsys):
    run_script("comparison_coverage.py", *arguments.split())
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("of", ["difference", "skewed"])
def test_means_that_are_no_share_are_covered_at_a_small_size(of, capsys):
    given = f"--of {of} --trials 40 --resamples 100 --prompts 20 --rates 0.1"
    run_script("interval_coverage.py", *given.split())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 20"))
    assert float(line.split("|")[2].split()[0]) >= 85


@pytest.fixture
def scripts(monkeypatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def test_an_exponent_tells_a_square_from_what_is_proportional(scripts):
    from measuring import exponent

    sizes = [1, 2, 4, 8] * 3
    shaken = [1.0, 1.02, 0.97, 1.01, 0.99, 1.03, 1.0, 0.98, 1.01, 0.97, 1.02, 1.0]
    for power in (0.0, 1.0, 2.0):
        values = [3 * size**power * by for size, by in zip(sizes, shaken, strict=True)]
        found, (low, high) = exponent(sizes, values)
        assert low < power < high and high - low < 0.1
        assert low < found < high
    assert exponent([1, 2, 4], [5, 5, 5]) == (0, (0, 0))
    with pytest.raises(ValueError, match="needs three different sizes"):
        exponent([1, 2, 2], [1, 2, 2])


def test_what_is_fixed_flattens_an_exponent_and_widens_its_interval(scripts):
    from measuring import exponent

    sizes = [1, 2, 4, 8, 16]
    found, (low, high) = exponent(sizes, [10 + size**2 for size in sizes])
    assert 0.5 < found < 1.5 and high - low > 0.5


def test_a_bench_says_where_it_was_measured(scripts, monkeypatch):
    import measuring

    monkeypatch.setattr(measuring.torch.cuda, "device_count", lambda: 0)
    line = measuring.on_this_machine(measuring.machine())
    assert f"torch {measuring.torch.__version__.partition('+')[0]}" in line
    assert line.endswith("Measured without a GPU: these are not the figures of one.")
    with_gpu = measuring.on_this_machine({**measuring.machine(), "gpus": ["H200"]})
    assert with_gpu.startswith("H200; ") and "without a GPU" not in with_gpu


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "row", "title", "another"),
    [
        ("compare_methods.py", "mapo", "MaPO", "SePPO, winners alone"),
        ("compare_responses.py", "kto", "KTO", "SimPO"),
    ],
)
def test_a_comparison_of_one_method_keeps_the_rows_of_all_others(
    script, row, title, another, tmp_path
):
    run_script(script, "--trial", "--only", row, "--folder", tmp_path)
    before = (ROOT / "docs/results.md").read_text().splitlines()
    after = (tmp_path / "results.md").read_text().splitlines()
    assert len(before) == len(after)
    changed = [line for line, other in zip(after, before, strict=True) if line != other]
    rows = [line for line in changed if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in rows] == ["base", title]
    assert any(line.startswith(f"| {another} |") for line in after)


def test_a_row_of_other_columns_is_not_kept(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from pages import merged

    before = "| a | b |\n|---|---|\n| x | 1 |\n| y | 2 |\n\nText."
    order = ["x", "y", "z"]
    new = merged(before, ["| a | b |", "|---|---|"], {"z": "| z | 3 |", "x": "| x | 9 |"}, order)
    assert new.splitlines()[2:] == ["| x | 9 |", "| y | 2 |", "| z | 3 |"]
    with pytest.raises(SystemExit, match="y cannot be kept: measure all rows again"):
        merged(before, ["| a | c |", "|---|---|"], {"x": "| x | 9 |"}, order)


def test_a_row_that_is_kept_stays_empty_under_a_column_that_is_new(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from pages import merged

    before = "| a | b |\n|---|---|\n| x | 1 |\n| y | 2 |"
    new = merged(before, ["| a | n | b |", "|---|---|---|"], {"x": "| x | 8 | 9 |"}, ["x", "y"])
    assert new.splitlines()[2:] == ["| x | 8 | 9 |", "| y |  | 2 |"]


def test_the_figures_of_the_demos_go_into_the_pages(tmp_path, monkeypatch):
    for page in ("README.md", "docs/results.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    interval = {"low": 0.5, "high": 0.75}
    comparison = {
        **{"items": 8, "prompts": 2, "baseline_mean": 0.5, "model_mean": 0.625},
        **{"mean_difference": 0.125, "mean_difference_interval": interval},
        **{"wins": 3, "ties": 4, "losses": 1, "win_rate": 0.75, "win_rate_interval": interval},
    }
    names = (
        *("chair_s", "chair_i", "recall", "repetition_s", "mean_length"),
        *("pope_accuracy", "pope_yes_ratio"),
    )
    figures = {
        name: {"label": name, "value": 12.5, "unit": "percent", "interval": [10, 15]}
        for name in names
    }
    written = {
        "demo": ("compare.json", {"comparisons": [comparison]}, "comparison.png", DPO),
        "demo_vlm": (
            *("responses.json", {"base": figures, "aligned": figures}, "descriptions.png"),
            "configs/playground/responses/mdpo.yaml",
        ),
    }
    for run, (name, content, image, config) in written.items():
        folder = tmp_path / "runs" / run / "evaluation"
        folder.mkdir(parents=True)
        (folder / name).write_text(json.dumps(content))
        Image.new("RGB", (8, 8)).save(folder / image)
        shutil.copy(ROOT / config, folder.parent / "config.yaml")
        (folder.parent / "timing.jsonl").write_text('{"samples_per_second": 64}\n')
    monkeypatch.chdir(tmp_path)
    run_script("update_readme.py")
    readme = (tmp_path / "README.md").read_text()
    assert "| wins / ties / losses | | 3 / 4 / 1 |" in readme
    assert "| chair_s | 12.5 (10.0 to 15.0) | 12.5 (10.0 to 15.0) |" in readme
    assert "250 steps of 16 pairs in 62 s" in (tmp_path / "docs/results.md").read_text()
    assert Path("assets/demo/grid.png").exists() and Path("assets/demo/descriptions.png").exists()
