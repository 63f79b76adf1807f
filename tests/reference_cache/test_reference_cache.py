"""Reference caches: what they serve, what they refuse, and what faults cannot do to them."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from cache_faults import IDS, PLAN, ROWS, SHARDS, build, content_of, read_all, values_of
from safetensors.torch import load_file

from str_kernels import SafetyTokens
from str_kernels.reference_cache.reader import (
    KEY,
    PACKED,
    SHIFTED,
    CachedReference,
    read_timings,
    verify_cache,
)
from str_kernels.reference_cache.writer import batches_of, build_reference_cache


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
        "safety_tokens": tokens.fingerprint,
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
