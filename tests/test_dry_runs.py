"""Every config that is shipped, by a dry run against tiny stand-ins of its model and its data.

A working folder holds them under the very names that the configs have: a folder OWNER/NAME is found
before the hub is asked. Those of the playground are trained for two steps elsewhere, and synthesis
has no dry run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import tarfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL

from diffalign import config
from diffalign.data.pairs.config import PairConfig
from diffalign.data.pairs.formats.base import open_data
from diffalign.data.pairs.preview import first_rows
from diffalign.errors import DataError
from diffalign.jobs import generate, train
from diffalign.models.lora import LoraSettings
from diffalign.models.vlm.config import VLM
from diffalign.rollouts.groups import read_groups
from diffalign.training.config import RunConfig
from tests.data.responses.formats.forms import FORMS, write_lines, write_list
from tests.layouts import make_pairs, pickapic_rows, write_rows
from tests.tiny_clip import write_clip
from tests.tiny_models import write_sd3
from tests.tiny_vlm import tiny_llava, tiny_qwen2_5_vl

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not {"playground", "synthesis"} & set(path.parts)
]
PAIRS = make_pairs(6, size=(40, 32))


def open_preferences(folder: Path) -> None:
    """data-is-better-together/open-image-preferences-v1-binarized."""
    rows = [
        {
            "prompt": pair.caption,
            "chosen": {"bytes": pair.chosen, "path": "a.jpg"},
            "rejected": {"bytes": pair.rejected, "path": "b.jpg"},
        }
        for pair in PAIRS
    ]
    image = datasets.Image()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": image, "rejected": image}
    )
    file = folder / "data/train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)


def pickapic(folder: Path) -> None:
    """Its mirrors have its columns, and names of files with a digest."""
    write_rows(folder / "data/train-00000-of-00645-b66ac786bf6fb553.parquet", pickapic_rows(PAIRS))


def rapidata(folder: Path) -> None:
    """Votes for either image; the split is a part of the set."""
    rows = [
        {
            "prompt": pair.caption,
            "image1": {"bytes": pair.rejected, "path": "1.jpg"},
            "image2": {"bytes": pair.chosen, "path": "2.jpg"},
            "votes_image1": 3,
            "votes_image2": 7 + number,
            "model1": "flux",
            "model2": "sd3",
            "detailed_results": json.dumps({"votes": []}),
            "image1_path": "flux/1.jpg",
            "image2_path": "sd3/1.jpg",
        }
        for number, pair in enumerate(PAIRS)
    ]
    file = folder / "data/train_0001-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def hpdv3(folder: Path) -> None:
    """`path1` is the preferred image; half the rows have no confidence."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, pair in enumerate(PAIRS):
        for name, content in (("good", pair.chosen), ("bad", pair.rejected)):
            (folder / f"images/{name}{number}.png").write_bytes(content)
        voted = number % 2 == 0
        rows.append(
            {
                "prompt": pair.caption,
                "choice_dist": [12, 7] if voted else None,
                "confidence": 0.98 if voted else None,
                "path1": f"images/good{number}.png",
                "path2": f"images/bad{number}.png",
                "model1": "flux",
                "model2": "infinity",
            }
        )
    (folder / "train.json").write_text(json.dumps(rows))


def image_reward(folder: Path) -> None:
    """A row an image, turned into a row a prompt by the lines in the config's comment."""
    rows = []
    for number, pair in enumerate(PAIRS):
        name = f"images/train/train_1/{number}.webp"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pair.chosen)
        rows.append(
            {
                "image_path": name,
                "prompt_id": f"000864-{number // 3:04d}",
                "prompt": PAIRS[number // 3].caption,
                "classification": "People",
                "image_amount_in_total": 3,
                "rank": 1 + number % 3,
                "overall_rating": 7 - number % 3,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata-train.parquet")
    comment = (ROOT / "configs/diffusion_dpo/sd15_imagereward.yaml").read_text()
    found = re.search(r'python -c "\n(.*?)"\)', comment, re.DOTALL)
    assert found is not None
    lines = textwrap.dedent(found[1].replace("#   ", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(lines, {})


def scored_groups(folder: Path) -> None:
    """A row a prompt: images and the score of each."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, pair in enumerate(PAIRS):
        names = [f"images/{number}-{side}.png" for side in ("good", "bad")]
        for name, content in zip(names, (pair.chosen, pair.rejected), strict=True):
            (folder / name).write_bytes(content)
        rows.append({"prompt": pair.caption, "images": names, "scores": [1.5, 0.5]})
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ranked_groups(folder: Path, model: Path) -> None:
    """Two images of one prompt with their trajectories, and what a person said of them."""
    generate.run(
        config.load(
            generate.GenerateConfig,
            None,
            [
                f"models.base={model}",
                "prompts.texts=[a cat]",
                "trajectories.images_per_group=2",
                "batch_size=2",
                f"output={folder}",
            ],
        )
    )
    group = read_groups(folder)[0]
    preference = {"group": group.group, "ranking": [0, 1]}
    (folder / "preferences.jsonl").write_text(json.dumps(preference) + "\n")


def questions(folder: Path) -> None:
    """Yes-or-no questions of POPE's form with a prompt to describe the image besides, the objects
    of the images, and CHAIR's table of their names."""
    rows = [
        {
            "question_id": number,
            "image": f"asked-{number}.png",
            "text": "Is there a cat in the image?",
            "label": "yes",
            "prompt": "Describe this image.",
        }
        for number in range(6)
    ]
    for row, pair in zip(rows, PAIRS, strict=True):
        (folder / str(row["image"])).write_bytes(pair.chosen)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "objects.json").write_text(json.dumps({f"asked-{n}": ["cat"] for n in range(6)}))
    (folder / "synonyms.txt").write_text("dog, puppy\ncat\n")


_LLAVA = "llava-hf/llava-1.5-7b-hf"
IMAGE_SETS: Mapping[str, Callable[[Path], None]] = {
    "data-is-better-together/open-image-preferences-v1-binarized": open_preferences,
    "liuhuohuo2/pick-a-pic-v2": pickapic,
    "pickapic-anonymous/pickapic_v1": pickapic,
    "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3": rapidata,
    "HPDv3": hpdv3,
    "ImageRewardDB": image_reward,
    "scored": scored_groups,
}
RESPONSE_SETS = {
    "openbmb/RLHF-V-Dataset/data.jsonl": "rlhf_v",
    "openbmb/RLAIF-V-Dataset/data.jsonl": "rlaif_v",
    "MMInstruction/VLFeedback/data.jsonl": "vlfeedback",
    "fwnlp/mDPO-preference-data/data.json": "mdpo",
    "data/ha_dpo.jsonl": "trl",
    "data/mask_dpo.jsonl": "mask_dpo",
    "data/povid.json": "povid",
    "data/mia_dpo/pairs.jsonl": "mia_dpo",
    "data/opa_dpo/pairs.jsonl": "opa_dpo",
    "data/re_align/pairs.jsonl": "re_align",
    "data/hsa_dpo/hsa_dpo_preference_llava1dot5.jsonl": "hsa_dpo",
    "data/rationales.jsonl": "rationale",
}


@pytest.fixture(scope="module")
def working_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_sdxl: Path
) -> Path:
    """Everything that the configs name, under its name."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_sd15, folder / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    shutil.copytree(tiny_sdxl, folder / "stabilityai/stable-diffusion-xl-base-1.0")
    write_sd3(folder / "stabilityai/stable-diffusion-3.5-medium")
    AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae").save_pretrained(
        folder / "madebyollin/sdxl-vae-fp16-fix"
    )
    for name in ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        write_clip(folder / name)
    for name in (_LLAVA, "runs/povid_llava15_stage1/final/merged"):
        tiny_llava(folder / name)
    tiny_qwen2_5_vl(folder / "Qwen/Qwen2.5-VL-7B-Instruct")
    for name, write in IMAGE_SETS.items():
        write(folder / name)
    for name, form in RESPONSE_SETS.items():
        write = write_list if name.endswith(".json") else write_lines
        file = write(folder / name.replace("/", "_"), [FORMS[form](i) for i in range(6)])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for image in file.parent.glob("*.png"):
            shutil.copy(image, (folder / name).parent)
        shutil.move(file, folder / name)
    questions(folder)
    for name in ("data/mdpo", "data/coco/train2014", "data/hsa_dpo/image"):
        shutil.copytree(folder / "openbmb/RLHF-V-Dataset", folder / name)
    stage_1 = VLM(path=str(folder / _LLAVA), lora=LoraSettings(rank=256, alpha=512))
    trained = stage_1.load(
        device=torch.device("cpu"), compute_dtype=torch.float32, reference="adapter_off"
    )
    trained.export(folder / "runs/opa_dpo_llava15_stage1/final")
    ranked_groups(folder / "groups", folder / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    (folder / "assets").symlink_to(ROOT / "assets")
    (folder / "4k_training_prompts.json").write_text(json.dumps([{"caption": "a cat"}] * 3))
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_passes_its_dry_run(path, working_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(working_folder)
    tree = yaml.safe_load((ROOT / path).read_text())
    overrides = [f"output={tmp_path / 'run'}"]
    for section in ("model", "model.base"):
        keys = tree["model"] if section == "model" else tree["model"].get("base", {})
        overrides += [f"{section}.revision=null"] if "revision" in keys else []
    if tree["training"].get("precision") == "fp16" and not torch.cuda.is_available():
        overrides += ["training.precision=bf16"]
    if importlib.util.find_spec("bitsandbytes") is None and "8bit" in str(tree["optimizer"]):
        overrides += ["optimizer.kind=adamw"]
    if importlib.util.find_spec("bitsandbytes") is None and "quantization" in tree["model"]:
        overrides += ["model.quantization=null"]
    train.run(config.load(RunConfig, ROOT / path, overrides), dry_run=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "All checks passed; nothing was trained." in said
    assert "missing image" not in said and "skipped" not in said


@pytest.mark.parametrize(
    ("path", "split", "rule", "pairs"),
    [
        (
            "data-is-better-together/open-image-preferences-v1-binarized",
            "train",
            "preferred is chosen in every row",
            6,
        ),
        ("liuhuohuo2/pick-a-pic-v2", "train", "the larger of label_0 and label_1", 6),
        (
            "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3",
            "train_0001",
            "the larger of votes_image1 and votes_image2",
            6,
        ),
        ("HPDv3/train.json", "train", "preferred is path1 in every row", 6),
        ("ImageRewardDB/groups.parquet", "train", "the smaller of rank", 6),
    ],
)
def test_published_columns_mean_what_their_authors_say(
    path, split, rule, pairs, working_folder, monkeypatch
):
    monkeypatch.chdir(working_folder)
    settings = PairConfig(path=path, split=split, resolution=64)
    data = open_data(settings)
    assert rule in data.summary
    rows = first_rows(data, 100, settings)
    assert len(rows) == pairs
    assert all(isinstance(row.chosen, tuple) and isinstance(row.rejected, tuple) for row in rows)
    if not path.startswith("ImageRewardDB"):
        content = [pair.chosen for pair in data.pairs()]
        read = [c if isinstance(c, bytes) else Path(c).read_bytes() for c in content]
        assert read == [pair.chosen for pair in PAIRS]


def test_path1_and_path2_are_not_guessed_where_a_column_may_say_who_won(tmp_path):
    row = {"prompt": "a cat", "path1": "a.png", "path2": "b.png", "winner": 2}
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="no preference in the columns"):
        open_data(PairConfig(path=str(tmp_path / "pairs.json"), resolution=64))
    scored = {**row, "score1": 1, "score2": 3}
    (tmp_path / "pairs.json").write_text(json.dumps([scored]))
    data = open_data(PairConfig(path=str(tmp_path / "pairs.json"), resolution=64))
    assert "the larger of score1 and score2" in data.summary


def test_tar_shards_of_the_mirror_have_members_without_endings(tmp_path):
    with tarfile.open(tmp_path / "train_00000.tar", "w") as shard:
        for row in pickapic_rows(PAIRS):
            for name, value in row.items():
                content = value if isinstance(value, bytes) else str(value).encode()
                member = tarfile.TarInfo(f"{row['ranking_id']:032x}.{name}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    settings = PairConfig(path=str(tmp_path), resolution=64)
    data = open_data(settings)
    assert [pair.chosen for pair in data.pairs()] == [pair.chosen for pair in PAIRS]
