from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from diffalign.training.hooks import previews as module
from diffalign.training.hooks.preview_makers import AbstractMaker, PreviewItem
from diffalign.training.hooks.preview_trackers import send_previews
from diffalign.training.hooks.previews import Previews, PreviewsConfig
from tests.runs import files
from tests.training.toys import toy_trainer, weights


class Painter(AbstractMaker):
    """Images whose colour is that of the weights, or the same in words; it uses random numbers."""

    def __init__(self, kind: str = "images", captions: tuple[str, ...] = ("a fox", "a <hat>")):
        self.kind, self.captions = kind, captions

    def previewed(self, run):
        return [
            PreviewItem(
                caption=text, images=(Image.new("RGB", (4, 4), "red"),) * (self.kind == "words")
            )
            for text in self.captions
        ]

    def make(self, run, previewed):
        torch.rand(3)
        assert not run.model.network.training
        total = sum(p.abs().sum().item() for _, p in run.model.trained_parameters())
        colours = [(int(total * 999) + 40 * i) % 256 for i in range(len(previewed))]
        if self.kind == "words":
            return [f"colour <{colour}>" for colour in colours]
        return [Image.new("RGB", (16, 16), (colour, 0, 90)) for colour in colours]


def hook(every: int = 2, maker: AbstractMaker | None = None, **settings) -> Previews:
    return Previews(PreviewsConfig(every=every, **settings), maker or Painter())


def run_of(output, *, hooks=None, **settings):
    settings = {"optimizer_steps": 5, "dropout": 0.4, **settings}
    return toy_trainer(output, hooks=[hook()] if hooks is None else hooks, **settings)


def names(output, pattern="step-*"):
    return sorted(path.name for path in (output / "previews").glob(pattern))


def test_previews_are_made_before_the_first_step_every_so_many_and_after_the_last(tmp_path):
    run_of(tmp_path).fit()
    steps = [f"step-{step:08d}-{i}.png" for step in (0, 2, 4, 5) for i in (0, 1)]
    assert names(tmp_path) == steps
    page = (tmp_path / "previews/index.html").read_text()
    assert all(f'src="{name}"' in page for name in steps)
    assert "a &lt;hat&gt;" in page and "<hat>" not in page
    with Image.open(tmp_path / "previews/strip.png") as strip:
        assert strip.width > strip.height  # four steps across, two prompts down


def test_a_run_with_previews_ends_with_the_weights_of_one_without(tmp_path):
    plain = run_of(tmp_path / "plain", hooks=[])
    plain.fit()
    watched = run_of(tmp_path / "watched")
    watched.fit()
    assert torch.equal(weights(plain), weights(watched))
    assert all(module.training for module in watched.model.network.modules())


@pytest.mark.parametrize("kind", ["images", "words"])
@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_ends_with_the_same_previews(tmp_path, kind, at):
    def watched(output, **settings):
        return run_of(output, hooks=[hook(maker=Painter(kind))], **settings)

    watched(tmp_path / "whole").fit()
    watched(tmp_path / "cut", checkpoint_every=at, keep_checkpoints=9).fit()
    resumed = watched(tmp_path / "cut")
    resumed.resume(tmp_path / "cut" / f"checkpoint-{at}")
    for frame in (tmp_path / "cut/previews").glob("step-00000005-*"):
        frame.write_bytes(b"of a step that is done again")
    resumed.fit()
    assert files(tmp_path / "cut/previews") == files(tmp_path / "whole/previews")


def test_previews_of_other_prompts_are_not_continued(tmp_path, capsys):
    run_of(tmp_path, checkpoint_every=3).fit()
    resumed = run_of(tmp_path, hooks=[hook(maker=Painter(captions=("a hen", "a hat")))])
    resumed.console.quiet = False
    resumed.resume(tmp_path / "checkpoint-3")
    resumed.fit()
    assert names(tmp_path)[0] == "step-00000004-0.png"
    assert "made anew from step 3 on" in " ".join(capsys.readouterr().out.split())


def test_previews_of_an_earlier_run_are_removed_by_one_that_begins(tmp_path):
    run_of(tmp_path, optimizer_steps=9).fit()
    run_of(tmp_path, hooks=[hook(3)]).fit()
    assert names(tmp_path, "*-0.png") == [f"step-{n:08d}-0.png" for n in (0, 3, 5)]


def test_responses_are_kept_as_text_and_shown_on_the_page_next_to_their_image(tmp_path):
    run_of(tmp_path, hooks=[hook(maker=Painter("words"))]).fit()
    assert names(tmp_path)[0] == "step-00000000-0.txt"
    page = (tmp_path / "previews/index.html").read_text()
    text = (tmp_path / "previews/step-00000005-1.txt").read_text()
    assert text.replace("<", "&lt;").replace(">", "&gt;") in page
    assert page.count('src="question-') == 2
    assert (tmp_path / "previews/question-1.png").is_file()
    assert (tmp_path / "previews/strip.png").is_file()


def test_the_strip_shows_a_few_of_many_steps_and_the_page_all(tmp_path):
    run_of(tmp_path, hooks=[hook(1, columns=3)], optimizer_steps=6).fit()
    page = (tmp_path / "previews/index.html").read_text()
    assert page.count("<th>step") == 6 and "<th>start" in page
    with Image.open(tmp_path / "previews/strip.png") as strip:
        narrow = strip.width
    run_of(tmp_path / "all", hooks=[hook(1, columns=7)], optimizer_steps=6).fit()
    with Image.open(tmp_path / "all/previews/strip.png") as strip:
        assert strip.width > narrow


def test_where_nothing_is_known_to_preview_it_is_said(tmp_path, capsys):
    trainer = run_of(tmp_path, hooks=[hook(maker=Painter(captions=()))])
    trainer.console.quiet = False
    trainer.fit()
    assert "give previews.prompts, or previews.questions" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not (tmp_path / "previews").exists()


def test_a_full_disk_costs_previews_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(path, image):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = run_of(tmp_path)
    trainer.console.quiet = False
    monkeypatch.setattr(module, "write_image", full)
    assert trainer.fit()
    assert "the previews of step 4 could not be written" in " ".join(
        capsys.readouterr().out.split()
    )


def test_tensorboard_gets_images_and_text(tmp_path):
    class Tracker:
        name = "tensorboard"
        tracker = SummaryWriter(str(tmp_path))

    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    send_previews([Tracker()], ["a fox", "a hat"], [red, blue], step=3)
    send_previews([Tracker()], ["what is this?"], ["a fox"], step=4)
    Tracker.tracker.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    (image,) = events.Images("previews/1")
    assert (image.step, image.width, image.height) == (3, 8, 6)
    import io

    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert (shown == [0, 0, 255]).all()
    (text,) = events.Tensors("previews/0/text_summary")
    assert text.step == 4
    assert text.tensor_proto.string_val[0].decode() == "**what is this?**\n\na fox"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_images_with_captions_and_a_table_of_responses(name, monkeypatch):
    class Media:
        @staticmethod
        def Image(value, caption):  # as the packages name it
            return ("image", value, caption)

        @staticmethod
        def Table(columns, data):
            return ("table", columns, data)

    sent = []

    class Tracker:
        class tracker:
            @staticmethod
            def log(values, step):
                sent.append((step, values))

    Tracker.name = name
    monkeypatch.setitem(__import__("sys").modules, name, Media)
    send_previews([Tracker()], ["a fox"], [red := Image.new("RGB", (4, 4))], step=7)
    send_previews([Tracker()], ["what?"], ["a fox"], step=8)
    assert sent == [
        (7, {"previews/0": ("image", red, "a fox")}),
        (
            8,
            {
                "previews/responses": (
                    "table",
                    ["step", "question", "response"],
                    [[8, "what?", "a fox"]],
                )
            },
        ),
    ]
