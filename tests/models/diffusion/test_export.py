from __future__ import annotations

import pytest

from diffalign.models.diffusion.export import replacing


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "deep" / "final"
    for content in ("old", "new"):
        with replacing(folder) as partial:
            (partial / content).write_text(content)

    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in folder.parent.iterdir()] == ["final"]


def test_the_old_content_survives_a_failure(tmp_path):
    folder = tmp_path / "final"
    with replacing(folder) as partial:
        (partial / "old").write_text("old")

    with pytest.raises(OSError, match="disk full"), replacing(folder) as partial:
        (partial / "new").write_text("half")
        raise OSError("disk full")

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in folder.iterdir()] == ["old"]
