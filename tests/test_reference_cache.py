"""Reference caches: what they serve, what they refuse, and what faults cannot do to them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import time

import cache_faults
import pytest
import torch
from cache_faults import IDS, PLAN, ROWS, Builder, build, content_of, values_of
from safetensors.torch import load_file, save_file

from str_kernels import SafetyTokens
from str_kernels.reference_cache import (
    KEY,
    PACKED,
    SHIFTED,
    CachedReference,
    read_timings,
    tokens_fingerprint,
    verify_cache,
)
from str_kernels.reference_cache_writer import batches_of, build_reference_cache

# Kills, flips and truncations of one run; 100 is minutes (`STR_CACHE_FAULTS=100`).
FAULTS = int(os.environ.get("STR_CACHE_FAULTS", "12"))
SHARDS = [f"shard-{number:05d}.safetensors" for number in range(6)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache that was built without interruption, and is not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build(folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cache")


@pytest.fixture
def draw(rng):
    return random.Random(int(torch.randint(2**31, (), generator=rng)))


def batch_of(rows, side="right", **more):
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[at, where], mask[at, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, **more}


def truth(row):
    """Return a row's values up to the rounding of its batch."""
    return values_of([row])


def read_all(cached):
    return {tuple(row): cached.look_up({"input_ids": torch.tensor([row])}).values for row in ROWS}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What is served


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_in_any_order_and_batch(whole, side, draw):
    rows = draw.sample(ROWS, 11)
    found = CachedReference(whole).look_up(batch_of(rows, side))
    assert found.layouts == ({SHIFTED} if side == "left" else set())
    assert found.values.dtype == torch.float32
    for row, values in zip(rows, found.values, strict=True):
        filled = ~values.isnan()
        assert filled.all(1).sum() == len(row) and filled.any(1).sum() == len(row)
        torch.testing.assert_close(values[filled.all(1)], truth(row), rtol=0, atol=1e-5)


def test_whole_rows_need_no_mask_and_devices_are_met(whole, device):
    cached = CachedReference(whole)
    ids = torch.arange(IDS, device=device)
    values = cached(ids, {"input_ids": torch.tensor([ROWS[13]], device=device)})
    assert values.device == ids.device
    torch.testing.assert_close(values[0].cpu(), truth(ROWS[13]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"`ids` must have shape \(5,\)"):
        cached(ids[:2], {"input_ids": torch.tensor([ROWS[13]])})


def test_packed_rows_are_looked_up_one_by_one(whole):
    rows = [ROWS[8], ROWS[0], ROWS[30]]
    packed = {
        "input_ids": torch.tensor([[*ROWS[8], *ROWS[0], *ROWS[30]]]),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    cached = CachedReference(whole)
    found = cached.look_up(packed)
    assert found.layouts == {PACKED}
    expected = torch.cat([truth(row) for row in rows])
    torch.testing.assert_close(found.values[0], expected, rtol=0, atol=1e-5)
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in packed.items()}
    with pytest.raises(ValueError, match="row 0 of the batch is not there: 1 tokens, 0"):
        cached.look_up(padded)
    padded["attention_mask"] = (torch.arange(padded["input_ids"].shape[1]) < len(expected))[None]
    values = cached.look_up(padded).values[0]
    assert values[-3:].isnan().all() and torch.equal(values[:-3], found.values[0])
    with pytest.raises(ValueError, match="padded on the right; got packed"):
        cached(torch.arange(IDS), packed)
    packed["position_ids"][0, 3] += 1
    with pytest.raises(ValueError, match="`position_ids` must count up by 1"):
        cached.look_up(packed)


@pytest.mark.parametrize(
    ("row", "shown"),
    [(ROWS[8][:-1], ", ..."), (ROWS[7] + ROWS[8], ", ..."), ([91, 17], "2 tokens, 91, 17. ")],
)
def test_a_row_that_is_cut_joined_or_absent_is_named(whole, row, shown):
    first = ", ".join(map(str, row[:8]))
    with pytest.raises(ValueError) as caught:
        CachedReference(whole).look_up(batch_of([ROWS[3], row]))
    assert f"row 1 of the batch is not there: {len(row)} tokens, {first}" in str(caught.value)
    assert shown in str(caught.value)


def test_batches_that_ids_do_not_tell_apart_are_refused(whole):
    cached, batch = CachedReference(whole), batch_of(ROWS[:3])
    for name in ("pixel_values", "inputs_embeds", "token_type_ids"):
        with pytest.raises(ValueError, match=f"depend on `{name}`"):
            cached.look_up({**batch, name: torch.zeros(3)})
        cached.look_up({**batch, name: None})
    hole = batch["attention_mask"].clone()
    hole[2, 1] = 0
    for mask in (hole, hole[:, None, None], batch["attention_mask"] * 2, hole[:, 1:]):
        with pytest.raises(ValueError, match="`attention_mask` must"):
            cached.look_up({**batch, "attention_mask": mask})
    for positions in (torch.zeros(3, 3, 4), torch.arange(3)[None]):
        with pytest.raises(ValueError, match="`position_ids` must be"):
            cached.look_up({**batch, "position_ids": positions})
    with pytest.raises(ValueError, match="`position_ids` must be given with `cu_seq_lens_q`"):
        cached.look_up({**batch, "cu_seq_lens_q": torch.tensor([0, 3])})
    with pytest.raises(ValueError, match=r"`input_ids` must be \(B, T\)"):
        cached.look_up({"attention_mask": hole})


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_smaller_dtypes_lose_what_is_said(tmp_path, whole, dtype, step):
    build(tmp_path / "small", dtype=dtype)
    small, large = (read_all(CachedReference(folder)) for folder in (tmp_path / "small", whole))
    worst = max(
        ((small[row] - large[row]).abs() / large[row].abs().clamp(min=1e-3)).max() for row in small
    )
    assert step / 8 < worst <= step
    assert (tmp_path / "small" / SHARDS[0]).stat().st_size < (whole / SHARDS[0]).stat().st_size


def test_the_collator_adds_what_the_forward_takes(whole):
    cached = CachedReference(whole)
    collate = cached.with_collator(batch_of)
    batch = pickle.loads(pickle.dumps(collate))([ROWS[4], ROWS[5]])
    expected = cached.look_up(batch_of([ROWS[4], ROWS[5]])).values
    torch.testing.assert_close(batch[KEY], expected, rtol=0, atol=0, equal_nan=True)
    shifted = cached.with_collator(lambda rows: batch_of(rows, "left"))([ROWS[4], ROWS[5]])
    assert f"{KEY}_{SHIFTED}" in shifted and KEY not in shifted


def test_tokens_values_and_model_must_be_the_caches(tmp_path):
    tokens = SafetyTokens([4, 2], vocab_size=9, tokenizer_hash="d" * 64)
    options = PLAN | {
        "safety_tokens": tokens_fingerprint(tokens),
        "tokenizer": tokens.tokenizer_hash,
        "ids": 2,
        "made_with": {"dtype": "float32"},
    }
    build_reference_cache(
        tmp_path, ROWS[:2], lambda rows: torch.ones(sum(map(len, rows)), 2), **options
    )
    cached = CachedReference(tmp_path)
    cached.check_tokens(tokens)
    cached.check_values(False)
    cached.check_fingerprint("a" * 64)
    for wrong in (SafetyTokens([2, 4], None, None, "", 9, "d" * 64), SafetyTokens([4], None, None,
                  "", 9, "d" * 64)):  # fmt: skip
        with pytest.raises(ValueError, match="`safety_tokens` must be the 2 ids, in their order"):
            cached.check_tokens(wrong)
    for wrong in (SafetyTokens([4, 2]), SafetyTokens([4, 2], tokenizer_hash="e" * 64)):
        with pytest.raises(ValueError, match="`safety_tokens` must be of the tokenizer"):
            cached.check_tokens(wrong)
    with pytest.raises(ValueError, match="`penalty` must be of a kind that compares logits"):
        cached.check_values(True)
    with pytest.raises(ValueError, match=r"made from \(aaaaaaaaaaaa; dtype float32\); got ffff"):
        cached.check_fingerprint("f" * 64)
    CachedReference(tmp_path, check_model=False).check_fingerprint("f" * 64)


# Building


def test_duplicates_are_stored_once_and_batches_stay_in_a_shard(tmp_path):
    seen = []

    def make(rows):
        seen.append(rows)
        assert len(rows) * max(map(len, rows)) <= PLAN["batch_tokens"]
        return values_of(rows)

    progress = []
    rows = [*ROWS, *ROWS[:9]]
    report = build_reference_cache(
        tmp_path, rows, make, **PLAN, on_tokens=lambda done, total: progress.append((done, total))
    )
    assert (report.rows, report.duplicates, report.shards) == (len(ROWS), 9, len(SHARDS))
    assert report.tokens == report.computed_tokens == sum(map(len, ROWS))
    assert progress[0] == (0, report.tokens) and progress[-1] == (report.tokens, report.tokens)
    for batch in seen:
        assert len({ROWS.index(row) // PLAN["rows_per_shard"] for row in batch}) == 1
    assert sum(map(len, seen)) == len(ROWS) > len(seen)
    assert read_timings(tmp_path)[0] == report.tokens
    table = load_file(tmp_path / SHARDS[1])
    assert table["row_hash"][2].numpy().tobytes() == hashlib.sha256(
        b"".join(token.to_bytes(8, "little") for token in ROWS[9])
    ).digest()  # fmt: skip
    again = build(tmp_path)
    assert (again.kept, again.computed_tokens) == (len(SHARDS), 0)


def test_batches_are_of_like_length():
    assert batches_of([5, 1, 9, 1, 30], 20) == [[1, 3, 0], [2], [4]]


@pytest.mark.parametrize("change", [{"model": "9" * 64}, {"batch_tokens": 9}, {"dtype": "float16"},
    {"rows_per_shard": 3}, {"made_with": {"torch": "9"}}])  # fmt: skip
def test_another_plan_is_refused_by_name_unless_overwritten(cache, change):
    before = content_of(cache)
    with pytest.raises(ValueError, match=f"was built with {next(iter(change))} "):
        build(cache, **change)
    assert content_of(cache) == before
    build(cache, **change, overwrite=True)
    assert verify_cache(cache) == []
    build(cache, overwrite=True)
    assert content_of(cache) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"nothing but a cache; got .*thesis\.tex"):
            build(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir() if path.name != "build.lock"] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: torch.zeros(3, IDS), "`make` must return"),
        (lambda rows: values_of(rows).int(), "floating-point"),
        (lambda rows: values_of(rows) * torch.nan, "NaN or infinity"),
        (lambda rows: values_of(rows) + 1e6, "float16 can hold"),
    ],
)
def test_what_a_model_must_not_return(tmp_path, make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_reference_cache(tmp_path, ROWS, make, **PLAN, dtype="float16")
    with pytest.raises(ValueError, match="is not finished"):
        CachedReference(tmp_path)


def test_bad_arguments_and_folders(tmp_path):
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="`rows` must be"):
            build_reference_cache(tmp_path, rows, values_of, **PLAN)
    for wrong in ({"model": "x"}, {"ids": 0}, {"dtype": "int8"}, {"values": "probs"},
                  {"rows_per_shard": 0}, {"batch_tokens": 0}, {"made_with": {"a": 1}}):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
            build(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="is not one"):
        CachedReference(tmp_path)


# Faults


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
    monkeypatch.setitem(cache_faults.sys.modules, "fcntl", None)
    (tmp_path / "build.lock").touch()
    with pytest.raises(ValueError, match="delete it if none is running"):
        build(tmp_path)
    (tmp_path / "build.lock").unlink()
    build(tmp_path)
    assert content_of(tmp_path) == {
        name: data for name, data in content_of(whole).items() if name != "build.lock"
    }
