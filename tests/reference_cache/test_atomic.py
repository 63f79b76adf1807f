"""Folders that are whole or absent, and places that are looked at before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from str_kernels.files.atomic import MARKER, check_output, replacing_folder


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    return here


def make(path, marker="run", content="x"):
    with replacing_folder(path, marker=marker) as folder:
        (folder / "file").write_text(content)


@pytest.mark.parametrize("path", [".", "..", "/", "~", "x/..", "../../above/here", "{link}"])
def test_the_folders_one_stands_in_are_refused(path, working_directory):
    Path("x").mkdir()
    make(Path("../marked"))
    (working_directory / MARKER).write_text('{"kind": "run"}')
    Path("link").symlink_to("..")
    path = str(Path.home()) if path == "~" else path.format(link="link")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"`output` must not be the .* or a folder above"):
            check_output(Path(path), overwrite, marker="run")


def test_only_a_folder_of_its_kind_is_replaced(tmp_path):
    check_output(tmp_path / "new" / "run", marker="run")
    assert not (tmp_path / "new").exists()  # nothing is made by looking
    make(tmp_path / "new" / "run")
    with pytest.raises(ValueError, match="must not exist unless overwrite"):
        check_output(tmp_path / "new" / "run", marker="run")
    check_output(tmp_path / "new" / "run", True, marker="run")
    with pytest.raises(ValueError, match=r"of kind 'model' .* of kind 'run'"):
        check_output(tmp_path / "new" / "run", True, marker="model")
    assert list(json.loads((tmp_path / "new" / "run" / MARKER).read_text())) == ["kind", "version"]

    (tmp_path / "mine").mkdir()
    check_output(tmp_path / "mine", True, marker="run")  # nothing to lose
    for content in ("", "{}", "[]", '{"kind": "other"}', "\0"):
        (tmp_path / "mine" / MARKER).write_text(content)
        with pytest.raises(ValueError, match="must be empty or made by this command"):
            check_output(tmp_path / "mine", True, marker="run")


def test_places_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for path in (
        "file",
        "file/run",
        "file/a/run",
        "n" * 256,
        f"{'n' * 256}/run",
        "loop",
        "loop/run",
    ):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="`output` must be a folder"):
                check_output(tmp_path / path, overwrite, marker="run")
    # not too long as a name, but as that of the temporary folder beside it
    with pytest.raises(ValueError, match="`output` must be a folder that can be made"):
        check_output(tmp_path / ("n" * 250), marker="run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["above", "file", "loop"]


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied", str(kwargs["dir"]))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"can be made; .*Permission denied"):
        check_output(tmp_path / "run", marker="run")


def test_what_is_read_is_not_replaced(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"must not hold what is read; .*rows\.jsonl"):
        check_output(tmp_path / "run", True, marker="run", inputs=[tmp_path / "run" / "rows.jsonl"])
    # going on from a run into its own place: it is read whole before it is replaced
    check_output(tmp_path / "run", True, marker="run", inputs=[tmp_path / "run"])


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    for content in ("first", "second"):
        check_output(tmp_path / "link", True, marker="run")
        make(tmp_path / "link", content=content)
        assert (tmp_path / "disk" / "run" / "file").read_text() == content
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    make(tmp_path / "run", content="old")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        make(tmp_path / "run")
    assert (tmp_path / "run" / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["above", "run"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_others(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "run") as folder:
            (folder / "inner").mkdir()
            for file in (folder / "weights", folder / "inner" / "weights", folder / "program"):
                file.write_text("x")
                file.chmod(0o700 if file.name == "program" else 0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("run/**/[wp]*")}
    assert modes == {"weights": 0o666 & ~umask, "program": 0o100 | 0o666 & ~umask}
