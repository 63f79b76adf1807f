"""The finished stages of a job: kept, checked, made again where they are missing or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from str_kernels.files.stages import Stages


def test_a_stage_belongs_to_its_key_and_is_made_once(tmp_path: Path) -> None:
    said: list[str] = []
    first = Stages(tmp_path / "s", {"seed": 1}, said.append)
    assert first.result("a", lambda: (1, "x")) == [1, "x"]
    assert first.result("a", lambda: [2]) == [1, "x"]
    assert Stages(tmp_path / "s", {"seed": 1}, said.append).result("a", lambda: [3]) == [1, "x"]
    assert Stages(tmp_path / "s", {"seed": 2}, said.append).result("a", lambda: [3]) == [3]
    assert said == []
    first.remove()
    assert not (tmp_path / "s").exists()
    assert first.result("a", lambda: [4]) == [4]


@pytest.mark.parametrize("broken", ["{", "[]", '{"value": [1, "x"]}', ""])
def test_a_damaged_result_is_named_and_made_again(tmp_path: Path, broken: str) -> None:
    said: list[str] = []
    stages = Stages(tmp_path, "key", said.append)
    stages.result("a", lambda: [1])
    (stages.place / "a.json").write_text(broken)
    assert stages.result("a", lambda: [2]) == [2]
    assert stages.result("a", lambda: [3]) == [2]
    assert said == [f"{stages.place / 'a.json'} is damaged; that stage is made again"]


def test_a_folder_is_whole_or_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    stages = Stages(tmp_path, "key", said.append)
    made: list[str] = []

    def make(folder: Path) -> None:
        made.append("whole")
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text(str(len(made)))

    def killed(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.folder("f", killed)
    assert list(stages.place.iterdir()) == []
    folder = stages.folder("f", make)
    assert stages.folder("f", killed) == folder and (folder / "deep" / "a").read_text() == "1"
    assert said == []
    (folder / "deep" / "a").write_text("9")
    assert stages.folder("f", make) == folder and (folder / "deep" / "a").read_text() == "2"
    (fault,) = said
    assert fault.startswith(f"{folder / 'deep' / 'a'} is missing or was changed")
    assert [path.name for path in stages.place.iterdir()] == ["f"]
