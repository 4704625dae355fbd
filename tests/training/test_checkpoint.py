from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign.errors import CheckpointError
from diffalign.training import checkpoint
from diffalign.training.checkpoint import Checkpoint, StartingPoint


def some(step: int, size: int = 4) -> Checkpoint:
    return Checkpoint(
        step=step, tensors={"weights": {"w": torch.full((size,), step * 1.0)}}, state={"a": [1]}
    )


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, some(7), keep=1)
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.step == 7 and loaded.state == {"a": [1]}
    assert torch.equal(loaded.tensors["weights"]["w"], torch.full((4,), 7.0))


def test_only_the_newest_are_kept_in_numeric_order(tmp_path):
    for step in (8, 9, 10, 11):
        checkpoint.save_checkpoint(tmp_path, some(step), keep=2)
    names = [path.name for path in checkpoint.checkpoints_in(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-11"]


def test_saving_after_going_back_drops_the_steps_that_were_given_up(tmp_path):
    for step in (10, 20):
        checkpoint.save_checkpoint(tmp_path, some(step), keep=2)
    checkpoint.save_checkpoint(tmp_path, some(15), keep=2)
    names = [path.name for path in checkpoint.checkpoints_in(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-15"]


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path):
    """A file-size limit makes the write itself fail, as a full disk does."""
    checkpoint.save_checkpoint(tmp_path, some(1), keep=1)
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from diffalign.errors import CheckpointError\n"
        "from diffalign.training.checkpoint import Checkpoint, save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "big = Checkpoint(step=2, tensors={'weights': {'w': torch.zeros(100_000)}}, state={})\n"
        "try:\n"
        "    save_checkpoint(Path(sys.argv[1]), big, keep=1)\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "checkpoint-2: the checkpoint could not be written" in result.stdout
    assert "checkpoint-1 is left as it was" in result.stdout and "MiB are free" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint-1").step == 1


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed(tmp_path):
    partial = tmp_path / ".checkpoint-3.partial"
    partial.mkdir()
    assert checkpoint.checkpoints_in(tmp_path) == []
    checkpoint.clear_unfinished(tmp_path)
    assert not partial.exists()


def test_a_damaged_checkpoint_is_refused_and_an_older_one_named(tmp_path):
    checkpoint.save_checkpoint(tmp_path, some(1), keep=2)
    path = checkpoint.save_checkpoint(tmp_path, some(2), keep=2)
    (path / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(
        CheckpointError,
        match=r"damaged: weights\.safetensors has.*resume from .*checkpoint-1 instead",
    ):
        checkpoint.load_checkpoint(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no state\.json"):
        checkpoint.load_checkpoint(tmp_path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_state(folder: Path, change) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(change(state)))


def without(*keys: str):
    return lambda f: change_state(f, lambda s: {k: v for k, v in s.items() if k not in keys})


def put(**values):
    return lambda f: change_state(f, lambda s: s | values)


def write_state(content: bytes):
    return lambda f: (f / "state.json").write_bytes(content)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def rename(name: str):
    return lambda folder: folder.rename(folder.with_name(name))


def replace_by_folder(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").mkdir()


DAMAGE = {
    "a bit": (lambda f: flip_a_bit(f / "weights.safetensors"), "weights.* its SHA-256 differs"),
    "a cut file": (lambda f: cut(f / "weights.safetensors"), "bytes and was written with"),
    "an emptied file": (lambda f: (f / "weights.safetensors").write_bytes(b""), "has 0 bytes"),
    "a missing file": (lambda f: (f / "weights.safetensors").unlink(), "weights.* is missing"),
    "a foreign file": (lambda f: (f / "more.safetensors").write_bytes(b"x"), "holds more.safet"),
    "a folder within": (lambda f: (f / "more").mkdir(), "it holds more, which is no file of it"),
    "a folder as file": (replace_by_folder, "weights.safetensors is missing"),
    "no state": (lambda f: (f / "state.json").unlink(), "it has no state.json"),
    "a cut state": (lambda f: cut(f / "state.json"), "state.json cannot be read"),
    "an empty state": (write_state(b""), "state.json cannot be read"),
    "a state not in UTF-8": (write_state(b'{"a": "\xff\xfe"}'), "state.json cannot be read"),
    "a deep state": (write_state(b"[" * 100_000), "state.json cannot be read"),
    "a long number": (write_state(b"9" * 10_000), "state.json"),
    "a list": (write_state(b"[]"), "holds a list, not an object"),
    "an empty object": (write_state(b"{}"), "has no identity"),
    "a bare step": (write_state(b'{"step": 30}'), "has no identity"),
    "another step": (put(step=31), "digest differs"),
    "another value": (put(a=[2]), "digest differs"),
    "no digest": (without("sha256"), "state.json has changed"),
    "no list": (without("files"), "state.json has changed"),
    "a shorter list": (put(files={}), "digest differs"),
    "an odd list": (put(files=3), "digest differs"),
    "another name": (rename("checkpoint-40"), "holds step 30, and its name says otherwise"),
    "no number": (rename("checkpoint-abc"), "checkpoint-abc is not called checkpoint- and the"),
    "zeros before": (rename("checkpoint-0030"), "checkpoint-0030 is not called"),
    "other digits": (rename("checkpoint-\u0663\u0660"), "is not called"),
    "a power": (rename("checkpoint-3\u00b2"), "is not called"),
    "a file in its place": (become_a_file, "checkpoint-30 is a file, where a checkpoint is a"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_any_kind_is_told_and_the_next_older_one_is_taken(tmp_path, kind):
    do, told = DAMAGE[kind]
    for step in (10, 20, 30):
        checkpoint.save_checkpoint(tmp_path, some(step), keep=3)
    assert checkpoint.starting_point(tmp_path) == StartingPoint(tmp_path / "checkpoint-30", ())
    do(tmp_path / "checkpoint-30")
    there = sorted(path.name for path in tmp_path.rglob("*"))
    start = checkpoint.starting_point(tmp_path)
    assert start.path == tmp_path / "checkpoint-20"
    (note,) = start.notes
    assert re.search(told, note)
    flip_a_bit(tmp_path / "checkpoint-20/weights.safetensors")
    assert checkpoint.starting_point(tmp_path).path == tmp_path / "checkpoint-10"
    flip_a_bit(tmp_path / "checkpoint-10/weights.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint.* and nothing was changed"):
        checkpoint.starting_point(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == there


def test_every_bit_of_a_checkpoint_counts_or_changes_nothing(tmp_path):
    """Whichever bit of any file flips: it is damage, or what is read is the same."""
    path = checkpoint.save_checkpoint(tmp_path, some(3), keep=1)
    seen = 0
    for file in path.iterdir():
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            try:
                loaded = checkpoint.load_checkpoint(path)
            except CheckpointError:
                seen += 1
            else:
                assert loaded.step == 3 and loaded.state == {"a": [1]}
                assert torch.equal(loaded.tensors["weights"]["w"], torch.full((4,), 3.0))
        file.write_bytes(content)
    assert seen > 200


def test_what_systems_leave_in_a_folder_is_no_damage(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, some(1), keep=1)
    (path / ".DS_Store").write_bytes(b"x")
    (path / "Thumbs.db").write_bytes(b"x")
    assert checkpoint.starting_point(tmp_path) == StartingPoint(path, ())


def test_a_run_without_any_checkpoint_begins_anew_and_a_renamed_one_is_not_lost(tmp_path):
    assert checkpoint.starting_point(tmp_path) == StartingPoint(None, ())
    (tmp_path / "checkpoint-abc").write_text("a note")
    start = checkpoint.starting_point(tmp_path)
    assert start.path is None and "checkpoint-abc is a file" in start.notes[0]
    checkpoint.save_checkpoint(tmp_path, some(7), keep=1).rename(tmp_path / "checkpoint-007")
    with pytest.raises(CheckpointError, match=r"checkpoint-007 is not called.*Give it back its"):
        checkpoint.starting_point(tmp_path)


def test_a_checkpoint_of_an_older_version_is_taken_and_that_it_has_no_digests_is_said(tmp_path):
    state = {"identity": {}, "source": {}, "schedule": {}, "optimizer": {}}
    state |= {"bad_steps": 0, "bad_in_a_row": 0, "loss_scaler": None}
    tensors = {"weights": {"w": torch.ones(2)}, "rank-0": {"rng.cpu": torch.ones(2)}}
    for step in (1, 2):
        old = Checkpoint(step=step, tensors=tensors, state=state)
        without("files", "sha256")(checkpoint.save_checkpoint(tmp_path, old, keep=9))
    start = checkpoint.starting_point(tmp_path)
    assert start.path == tmp_path / "checkpoint-2" and "older version" in start.notes[0]
    assert checkpoint.load_checkpoint(start.path).state == state
    cut(start.path / "weights.safetensors")
    start = checkpoint.starting_point(tmp_path)
    assert start.path == tmp_path / "checkpoint-1"
    assert "weights.safetensors cannot be read" in start.notes[0]


def test_a_step_that_is_saved_again_replaces_the_old_one_when_it_is_whole(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, some(5), keep=1)
    again = Checkpoint(step=5, tensors={"weights": {"w": torch.zeros(4)}}, state={"a": [2]})
    actual = Path.rename

    def killed(path, target):
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt  # between the two renames
        return actual(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, again, keep=1)
    monkeypatch.undo()
    checkpoint.undo_replacement(tmp_path)
    checkpoint.clear_unfinished(tmp_path)
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint-5").state == {"a": [1]}
    checkpoint.save_checkpoint(tmp_path, again, keep=1)
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint-5").state == {"a": [2]}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_disk_without_room_for_one_checkpoint_is_told_in_advance(tmp_path):
    checkpoint.check_room(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"takes at least .* MiB, and .* MiB are free there"):
        checkpoint.check_room(tmp_path, 1 << 60)
