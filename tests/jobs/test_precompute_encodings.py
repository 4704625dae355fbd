"""Encodings as the job computes them: whole, the same from anyone, refused where they differ."""

from __future__ import annotations

import dataclasses
import random
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffalign import config
from diffalign.cache import encodings as cache
from diffalign.cache import shards
from diffalign.cache.shards import ShardWriter
from diffalign.cli import app
from diffalign.engines.base import Sharing
from diffalign.errors import CacheError, ConfigError, DataError, DiffalignError, ModelError
from diffalign.files import read_json_lines
from diffalign.jobs import precompute, train
from diffalign.models.adapter_files import ADAPTER_FILE
from diffalign.training.config import RunConfig
from tests.layouts import make_pairs, write_rows, write_webdataset
from tests.processes import ended, started
from tests.runs import Killed, files, forget_accelerate
from tests.training.test_encodings import cached, run_of, write_all

ROOT = Path(__file__).parents[2]
FLIPPED = "data.flip=true"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("encodings"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "_SHARD_PAIRS", 4)
    monkeypatch.setattr(cache, "_SHARD_PROMPTS", 3)


def computed(run) -> Path:
    folder = precompute.run(run).folder
    forget_accelerate()
    return folder


@pytest.fixture
def whole(place, tmp_path, small_shards):
    """A folder of encodings of the run with that seed, and what is in it."""
    run = run_of(place, tmp_path / "run", FLIPPED, f"encodings_cache={tmp_path / 'whole'}")
    return run, files(computed(run))


def shards_of(content) -> list[str]:
    return sorted(name for name in content if name.endswith(".safetensors"))


def test_killed_at_any_point_it_goes_on_and_computes_no_finished_file_again(
    whole, tmp_path, monkeypatch
):
    run, content = whole
    write = ShardWriter.write
    names = shards_of(content)
    assert len(names) == 8
    for number, (done, before) in enumerate(
        [(n, b) for n in range(len(names)) for b in (0, 1)][:10]
    ):
        again = dataclasses.replace(run, encodings_cache=tmp_path / f"again-{number}")
        left = done

        def killed(self, name, *arguments, before=before):
            nonlocal left
            if not left and before:
                raise Killed
            write(self, name, *arguments)
            if not left:
                raise Killed
            left -= 1

        monkeypatch.setattr(ShardWriter, "write", killed)
        with pytest.raises(Killed):
            precompute.run(again)
        forget_accelerate()
        there = set(shards_of(files(again.encodings_cache)))
        assert len(there) == done + 1 - before
        written = []

        def noted(self, name, *arguments, written=written):
            written.append(name)
            write(self, name, *arguments)

        monkeypatch.setattr(ShardWriter, "write", noted)
        assert files(computed(again)) == content
        assert not there & set(written) and there | set(written) == set(names)


@dataclasses.dataclass
class AfterOpening:
    """The moment at which so many files were opened or renamed while a folder was there."""

    folder: Path
    left: int

    def __call__(self) -> bool:
        self.left -= self.folder.exists()
        return self.left < 0


@pytest.mark.slow
def test_sigkilled_at_ten_random_moments_it_goes_on_to_the_same_bytes(place, tmp_path):
    numbers = random.Random(0)
    more = (FLIPPED, f"encodings_cache={tmp_path / 'whole'}")
    content = files(computed(run_of(place, tmp_path / "run", *more)))
    config_file, folder, log = tmp_path / "run/CONFIG.yaml", tmp_path / "killed", tmp_path / "log"
    words = ("precompute", str(config_file), FLIPPED, f"encodings_cache={folder}")
    killed = 0
    while killed < 10:
        moment = AfterOpening(folder, numbers.randrange(40))
        finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
        with started(*words, log=log, moment=moment) as process:
            status = ended(process, log)
        assert status in (0, -signal.SIGKILL), log.read_text()
        killed += status != 0
        assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
        if status == 0:
            assert files(folder) == content
            shutil.rmtree(folder)
    again = run_of(place, tmp_path / "run", FLIPPED, f"encodings_cache={folder}")
    assert files(computed(again)) == content


def test_the_parts_of_two_shards_are_the_bytes_of_one_command(whole, tmp_path):
    run, content = whole
    run = dataclasses.replace(run, encodings_cache=tmp_path / "halves")
    assert precompute.run(run, sharing=Sharing.of(shard="2/2")) is None
    assert 1 < len(files(run.encodings_cache)) < len(content)
    assert precompute.run(run, sharing=Sharing.of(shard="1/2")) is not None
    assert files(run.encodings_cache) == content


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_write_the_same_bytes_as_one(place, tmp_path, python):
    run = run_of(place, tmp_path / "run", FLIPPED, f"encodings_cache={tmp_path / 'one'}")
    one = files(computed(run))
    words = [
        "precompute",
        tmp_path / "run/CONFIG.yaml",
        FLIPPED,
        f"encodings_cache={tmp_path / 'two'}",
    ]
    words += ["--processes", "2"]
    subprocess.run([python, "-m", "diffalign", *map(str, words)], check=True, timeout=500)
    assert files(tmp_path / "two") == one


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_found_and_it_alone_is_written_again(whole, damage):
    run, content = whole
    for name in (n for n in shards_of(content) if n.endswith("0000.safetensors")):
        file = run.encodings_cache / name
        broken = bytearray(content[name])
        broken[-9] ^= 1
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(broken if damage == "flipped" else content[name][:-9])
        if damage != "flipped":  # which only reading all of it shows
            with pytest.raises(
                CacheError, match=r"(?s)(damaged|not complete).*diffalign precompute"
            ):
                train.run(cached(run, run.encodings_cache))
            forget_accelerate()
        others = [run.encodings_cache / other for other in shards_of(content) if other != name]
        before = [other.stat().st_mtime_ns for other in others]
        assert files(computed(run)) == content
        assert [other.stat().st_mtime_ns for other in others] == before


@pytest.mark.parametrize("kind", ["pairs", "prompts"])
def test_a_damaged_row_is_skipped_with_its_reason(whole, kind):
    run, content = whole
    run = cached(run, run.encodings_cache)
    for name in shards_of(content):
        if name.startswith(kind):
            broken = bytearray(content[name])
            # Half of the images, headers being shorter than that; the last caption of each file.
            start = len(broken) // 2 if kind == "pairs" else len(broken) - 4
            broken[start:] = bytes(byte ^ 1 for byte in broken[start:])
            (run.encodings_cache / name).write_bytes(broken)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, max_bad_fraction=0.9))
    train.run(run)
    skipped = read_json_lines(run.output / "skipped.jsonl")
    damaged = [row for row in skipped if row["reason"] == "damaged encoding"]
    assert damaged and all("not as it was written" in row["detail"] for row in damaged)
    assert all("diffalign precompute" in row["detail"] for row in damaged)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=sd15", "model.kind was 'sdxl' there and is 'sd15' here"),
        ("model.vae_dtype=bf16", "model.vae_dtype was 'float32' there and is 'bf16' here"),
        ("model.vae_tiling=true", "model.vae_tiling was False there and is True here"),
        ("model.vae={place}/sd15/vae-2", "model's vae was .* there and is .* here"),
        ("model.path={place}/sdxl-2", "model's text_encoder_2 was .* there and is .* here"),
        ("training.precision=bf16", "training.precision was 'float32' there"),
        ("data.resolution=40", "data.resolution was 32 there and is 40 here"),
        ("data.path={place}/data-2", r"data \(files, or id and revision\) was"),
        ("data.path={place}/data-3", r"data \(captions and preferences\) was"),
        ("data.limit=9", "data.limit was None there and is 9 here"),
        ("data.buckets=true", "data.buckets was False there"),
        ("data={{crop: random, crops: 2}}", "data.crop was 'center' there"),
        ("data.max_pixels=900", "data.max_pixels was"),
        ("data.holdout=0.4", "data.holdout was None there"),
    ],
)
def test_encodings_of_other_settings_are_refused_by_name(
    place,
    whole,
    tmp_path,
    override,
    message,
):
    run, _ = whole
    _write_others(place)
    overrides = [override.format(place=place)]
    if override.startswith("model.kind"):
        overrides.append(f"model.path={place / 'sd15'}")
    if override.startswith("data={"):
        overrides = ["data.crop=random", "data.crops=2"]
    known = [FLIPPED, "model.encoders=cached", f"encodings_cache={run.encodings_cache}"]
    with pytest.raises(CacheError, match=f"{message}.*diffalign precompute"):
        train.run(run_of(place, tmp_path / "other", *known, *overrides))


def _write_others(place):
    """Once: another autoencoder and text encoder, other data, and data with another caption."""
    if (place / "data-2").exists():
        return
    shutil.copytree(place / "sd15/vae", place / "sd15/vae-2")
    shutil.copytree(place / "sdxl", place / "sdxl-2")
    for file in (
        place / "sd15/vae-2/diffusion_pytorch_model.safetensors",
        place / "sdxl-2/text_encoder_2/model.safetensors",
    ):
        changed = {name: value + 1e-3 for name, value in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    name = "train-00000-of-00001.parquet"
    table = pq.read_table(place / "data" / name).to_pylist()
    write_rows(place / "data-2" / name, table[:-1])
    table[0]["label_0"], table[0]["label_1"] = table[0]["label_1"], table[0]["label_0"]
    write_rows(place / "data-3" / name, table)


def test_fewer_ways_and_views_may_share_them_and_more_are_refused(
    place,
    whole,
    tmp_path,
):
    run, _ = whole
    known = ["model.encoders=cached", f"encodings_cache={run.encodings_cache}"]
    other = ["seed=7", "model.lora.rank=4", "training.optimizer_steps=1", "model.posterior=mean"]
    train.run(
        run_of(place, tmp_path / "a", *known, *other, "data.flip=false", "objective={kind: sft}")
    )
    forget_accelerate()
    means = run_of(
        place,
        tmp_path / "b",
        "data.flip=false",
        "model.posterior=mean",
        "objective={kind: sft}",
        f"encodings_cache={tmp_path / 'means'}",
    )
    computed(means)
    means = cached(means, means.encodings_cache)
    for change, message in (
        (
            {"model": dataclasses.replace(means.model, posterior="full")},
            "means of posteriors alone",
        ),
        ({"data": dataclasses.replace(means.data, flip=True)}, r"data.holdout|data.flip"),
        (
            {"objective": run.objective},
            r"the views \['chosen'\], and this run needs \['rejected'\]",
        ),
    ):
        with pytest.raises(CacheError, match=f"{message}.*diffalign precompute"):
            train.run(dataclasses.replace(means, **change))
        forget_accelerate()


def test_what_it_takes_is_said_to_the_byte_and_refused_where_there_is_less(
    place,
    tmp_path,
    monkeypatch,
    capsys,
):
    run = run_of(place, tmp_path / "run", FLIPPED, "data.limit=4", "data.caption_dropout=0.3")
    folder = computed(run)
    tensors = [value for f in folder.glob("*.safetensors") for value in load_file(f).values()]
    said = capsys.readouterr().out
    # 4 pairs x 2 views x 2 ways x 8 channels x 4 x 4; of 2 captions and the empty one 16 tokens of
    # 16 numbers, and 8 pooled ones
    expected = 4 * (4 * 2 * 2 * 8 * 4 * 4) + 4 * 3 * (16 * 16 + 8)
    assert sum(value.nbytes for value in tensors) == expected == 11_360
    assert "11.4 kB" in said
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shards.shutil,
        "disk_usage",
        lambda path: usage._replace(free=expected - 1 + shards.SPARE_BYTES),
    )
    run = dataclasses.replace(run, encodings_cache=tmp_path / "full")
    with pytest.raises(CacheError, match=r"would take 11.4 kB \(11,360 bytes\), and the disk has"):
        precompute.run(run)
    assert shards_of(files(tmp_path / "full")) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.crop=random"], "data.crop is random: anywhere is too many places.*data.crops"),
        (["data.streaming=true"], "data.streaming is true: of a stream nothing is computed"),
        (["previews={every: 1, prompts: [a]}"], "previews are sampled with autoencoder"),
        (["data.crop=center", "data.crops=3"], "crops is 3, a number of places for random crops"),
    ],
)
def test_what_needs_the_encoders_or_cannot_be_known_is_refused(
    place,
    tmp_path,
    overrides,
    message,
):
    for more in ([], ["model.encoders=cached"]):
        job = train if more else precompute
        with pytest.raises(DiffalignError, match=message):
            job.run(run_of(place, tmp_path / "run", *overrides, *more))
        forget_accelerate()


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("spo", "model.encoders=cached", "batches come from rollouts"),
        ("seppo", "model.encoders=cached", "batches come from rollouts"),
        ("spm", "seed=1", "model.kind step_aware has no encoders whose work could be done"),
        ("spm", "model.base.encoders=cached", "base.encoders is cached, and scores are of images"),
    ],
)
def test_runs_that_sample_or_score_have_no_encodings(name, override, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message):
        precompute.run(config.load(RunConfig, ROOT / f"configs/playground/{name}.yaml", [override]))


def test_tar_shards_are_refused(place, tmp_path):
    write_webdataset(tmp_path / "data", make_pairs(4))
    with pytest.raises(DataError, match="of a stream nothing is computed in advance"):
        precompute.run(run_of(place, tmp_path / "run", f"data.path={tmp_path / 'data'}"))


def test_an_adapter_is_trained_and_written_without_the_weights_of_the_encoders(
    place,
    tmp_path,
):
    model = shutil.copytree(place / "sdxl", tmp_path / "sdxl")
    run = run_of(place, tmp_path / "run", f"model.path={model}")
    run = cached(run, computed(run))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        for file in (model / part).glob("*.safetensors"):
            file.unlink()
    train.run(run)
    forget_accelerate()
    assert (run.output / "final" / ADAPTER_FILE).is_file()
    whole_network = dataclasses.replace(run.model, lora=None)
    with pytest.raises(ModelError, match=r"that is written in the end needs them.*vae"):
        train.run(dataclasses.replace(run, model=whole_network, output=tmp_path / "full"))


def test_the_printed_command_trains(place, tmp_path, capsys):
    run_of(place, tmp_path / "run 1")
    words = [str(tmp_path / "run 1/CONFIG.yaml"), "training.optimizer_steps=1"]
    result = CliRunner().invoke(app, ["precompute", *words], catch_exceptions=False)
    assert result.exit_code == 0
    (line,) = [li for li in result.output.splitlines() if li.strip().startswith("diffalign train")]
    forget_accelerate()
    result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run 1/final" / ADAPTER_FILE).is_file()
