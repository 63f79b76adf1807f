"""What faults cannot do to a reference cache: kills, flipped bits, cuts, forgery, a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time

import pytest
import torch
from cache_faults import IDS, ROWS, SHARDS, Builder, build, content_of, read_all
from safetensors.torch import load_file, save_file

from str_kernels.reference_cache.reader import CachedReference, verify_cache

# Kills, flips and truncations of one run (`STR_CACHE_FAULTS=100` for more).
FAULTS = int(os.environ.get("STR_CACHE_FAULTS", "12"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(whole, tmp_path, draw):
    expected, folder = content_of(whole), tmp_path / "cache"
    first = Builder(tmp_path / "timed")  # the server has started now
    begin = time.perf_counter()
    first.outcome()
    duration = time.perf_counter() - begin
    first.kill()
    kills = 0
    while kills < FAULTS:
        builder = Builder(folder)
        time.sleep(draw.uniform(0, duration))
        if builder.kill():
            kills += 1
        if (folder / "index.json").exists():  # then it is whole; the next begins anew
            assert content_of(folder) == expected
            shutil.rmtree(folder)
    report = build(folder)
    print(f"{kills} kills, {report.kept} of {report.shards} shards kept by the last run")
    assert content_of(folder) == expected
    assert report.rebuilt == ()  # a kill leaves whole shards only
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_resumed_run_computes_only_what_is_missing(cache, whole):
    (cache / "index.json").unlink()
    (cache / SHARDS[2]).unlink()
    for name in (SHARDS[4], SHARDS[5]):  # one flipped, one cut
        data = bytearray((cache / name).read_bytes())
        data[-300] ^= 4
        (cache / name).write_bytes(data[: len(data) - (7 if name == SHARDS[5] else 0)])
    (cache / ".shard-00002-ab1_d9zz.safetensors").write_bytes(b"left by a killed run")
    (cache / "shard-00006.safetensors").write_bytes(b"of no plan")
    report = build(cache)
    assert report.kept == 3
    assert [line.partition(":")[0] for line in report.rebuilt] == [SHARDS[4], SHARDS[5]]
    assert content_of(cache) == content_of(whole)


def fault_in(folder, draw, kind):
    """Flip a bit of a file or cut it; return its name."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    else:
        del data[at:]
    with path.open("r+b") as file:  # in place: whoever has it open sees it
        file.write(data)
        file.truncate()
    return path.name


@pytest.mark.parametrize("opened", ["before", "after"])
@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_a_fault_in_any_file_is_found_or_changes_nothing(whole, tmp_path, draw, kind, opened):
    expected = read_all(CachedReference(whole))
    found = 0
    for number in range(FAULTS):
        folder = shutil.copytree(whole, tmp_path / str(number))
        cached = CachedReference(folder) if opened == "before" else None
        name = fault_in(folder, draw, kind)
        try:
            served = read_all(cached or CachedReference(folder))
        except ValueError as error:
            found += 1
            assert name in str(error)
        else:
            assert same(served, expected)
        if name != "timings.json":  # of which nothing is served
            assert any(name in line for line in verify_cache(folder)), name
        shutil.rmtree(folder)
    print(f"{kind}, opened {opened}: {found} of {FAULTS} raised, the others changed nothing")
    assert found or opened == "before"  # a cut shard, say; the index is not read twice


def test_each_row_is_looked_at_when_it_is_served(cache):
    cached = CachedReference(cache)
    tables = load_file(cache / SHARDS[0])
    start = (cache / SHARDS[0]).read_bytes().index(tables["safety_logits"].numpy().tobytes())
    with (cache / SHARDS[0]).open("r+b") as file:
        file.seek(start + 4 * IDS * (len(ROWS[0]) + 1))  # in the second row
        file.write(b"\x00\x00\x00\x00")
    cached.look_up({"input_ids": torch.tensor([ROWS[0]])})
    with pytest.raises(ValueError, match="row 1 of it is not what was written; restore it, or run"):
        cached.look_up({"input_ids": torch.tensor([ROWS[1]])})


def test_sizes_are_looked_at_before_anything_is_mapped(cache):
    cached = CachedReference(cache)
    with (cache / SHARDS[3]).open("r+b") as file:
        file.truncate(100)  # of a larger file, reading on would end the process
    said = r"shard-00003\.safetensors: it has 100 bytes, the index says \d+; restore it"
    with pytest.raises(ValueError, match=said):
        cached.look_up({"input_ids": torch.tensor([ROWS[21]])})
    with pytest.raises(ValueError, match=said):
        CachedReference(cache)


def test_a_byte_that_nothing_depends_on_is_found_by_verify_and_made_good(cache, whole):
    """The header's padding: a space and a newline read the same."""
    for name in SHARDS:
        data = bytearray((cache / name).read_bytes())
        last = 7 + int.from_bytes(data[:8], "little")
        if data[last] == ord(" "):
            break
    assert data[last] == ord(" ")
    data[last] = ord("\n")
    (cache / name).write_bytes(data)
    assert same(read_all(CachedReference(cache)), read_all(CachedReference(whole)))
    [line] = verify_cache(cache)
    assert name in line and "its bytes are not" in line
    assert build(cache).rebuilt == (f"{name}: its bytes are not those that were written",)
    assert content_of(cache) == content_of(whole)


def reseal(folder, change):
    """Change the index as somebody would who can compute its checksum."""
    content = json.loads((folder / "index.json").read_text())
    del content["checksum"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b", "shard-00001",
    "shard-00001.safetensors", ".", "", 7, "shard-00000.safetensors\n"])  # fmt: skip
def test_names_in_the_index_are_ours_or_refused(cache, name):
    shutil.copy(cache / SHARDS[0], cache.parent / "other.safetensors")
    reseal(cache, lambda content: content["shards"][0].update(file=name))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        CachedReference(cache)


@pytest.mark.parametrize("field", ["rows", "tokens", "ids", "bytes", "rows_per_shard"])
@pytest.mark.parametrize("value", [2**40, 2**70, -1, 0, True, 1.5, "3", None])
def test_numbers_in_the_index_are_bounded_by_the_files(cache, field, value):
    reseal(cache, lambda content: (content["shards"][0] if field == "bytes" else content).update(
        {field: value}))  # fmt: skip
    with pytest.raises(ValueError, match=r"index\.json is damaged|it has \d+ bytes"):
        CachedReference(cache)


def test_an_index_that_was_tampered_with_otherwise(cache):
    for change in (
        lambda content: content.update(schema_version=2),
        lambda content: content.update(more=1),
        lambda content: content.pop("model"),
        lambda content: content.update(shards=[1]),
        lambda content: content["shards"].pop(),
        lambda content: content["shards"][0].update(tables_sha256="0" * 64),
        lambda content: content["shards"][0].update(rows=3, bytes=content["shards"][0]["bytes"]),
    ):
        before = (cache / "index.json").read_text()
        reseal(cache, change)
        with pytest.raises(ValueError, match="`folder` must"):
            CachedReference(cache)
        assert verify_cache(cache)
        (cache / "index.json").write_text(before)
    (cache / "index.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is damaged"):
        CachedReference(cache)


@pytest.mark.parametrize("name", [SHARDS[0], "index.json"])
def test_links_are_refused(cache, name):
    (cache / name).rename(cache.parent / "elsewhere")
    with pytest.raises(ValueError, match="`folder` must"):
        CachedReference(cache)  # missing
    (cache / name).symlink_to(cache.parent / "elsewhere")
    with pytest.raises(ValueError, match="must hold plain files"):
        CachedReference(cache)


def test_a_row_that_is_there_twice_is_refused(cache):
    tensors = load_file(cache / SHARDS[0])
    tensors["row_hash"][1] = tensors["row_hash"][0]
    save_file(tensors, cache / SHARDS[0])
    digest = hashlib.sha256()
    for name in ("offsets", "row_hash", "row_check"):
        digest.update(tensors[name].numpy().tobytes())
    entry = {
        "tables_sha256": digest.hexdigest(),
        "sha256": hashlib.sha256((cache / SHARDS[0]).read_bytes()).hexdigest(),
    }
    reseal(cache, lambda content: content["shards"][0].update(entry))
    with pytest.raises(ValueError, match="some are twice"):
        CachedReference(cache)


def test_two_builders_and_a_lock_that_dies_with_its_process(tmp_path, whole):
    builder = Builder(tmp_path / "cache")  # holds the lock until it is killed
    while not (tmp_path / "cache" / "plan.json").exists():
        time.sleep(0.001)
    builder.process.join(0)
    os.kill(builder.process.pid, 19)  # stopped in the middle, whatever it does
    try:
        with pytest.raises(ValueError, match="must not be built by two processes at once"):
            build(tmp_path / "cache")
    finally:
        builder.kill()
    build(tmp_path / "cache")
    assert content_of(tmp_path / "cache") == content_of(whole)


@pytest.mark.parametrize("name", ["plan.json", SHARDS[0], "index.json"])
def test_a_full_disk_surfaces_and_leaves_nothing_broken(tmp_path, whole, name):
    """A file may not grow by its last byte, and smaller ones are written before it."""
    builder = Builder(tmp_path / "cache", (whole / name).stat().st_size - 1)
    assert "File too large" in builder.outcome()
    builder.process.join()
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left <= {"build.lock", "plan.json", "timings.json", *SHARDS} - {name}
    build(tmp_path / "cache")
    assert content_of(tmp_path / "cache") == content_of(whole)


def test_where_there_is_no_flock_a_file_is_the_lock(tmp_path, monkeypatch, whole):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / "build.lock").touch()
    with pytest.raises(ValueError, match="delete it if none is running"):
        build(tmp_path)
    (tmp_path / "build.lock").unlink()
    build(tmp_path)
    assert content_of(tmp_path) == {
        name: data for name, data in content_of(whole).items() if name != "build.lock"
    }
