"""The Triton row step by itself: called directly, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS
from row_steps import (
    EVERYTHING,
    arguments,
    compare_gradient,
    compare_terms,
    factor_for,
    row_case,
    scales,
)

import str_kernels
from str_kernels.op.contracts import RowOptions, RowStep, RowTerms
from str_kernels.op.rows.rows_torch import row_step_torch

triton = pytest.importorskip("triton", reason="an optional dependency outside Linux")
from str_kernels.op.rows import rows_triton  # noqa: E402
from str_kernels.op.rows.rows_triton import Launch, launch_sizes, row_step_triton  # noqa: E402

# held: the row is read once; streamed: block by block; two launches: as on AMD, where the safety
# columns are the second.
WAYS = ["torch", "held", "streamed", "two launches"]


@pytest.fixture
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowStep:
    if request.param == "streamed":  # as if these rows were too long to be held
        monkeypatch.setattr(rows_triton, "_HELD_BYTES", 8)
        monkeypatch.setattr(rows_triton, "_THREADS", 128)
    if request.param == "two launches":
        monkeypatch.setattr(rows_triton, "BARRIERS_HOLD_LOADS", False)
    return row_step_torch if request.param == "torch" else row_step_triton


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["torch", "streamed"], indirect=True)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
def test_the_terms_of_a_row(step, transform, rng, device) -> None:
    """Every row has its penalty and drift, ignored or not; the reader leaves out what is off."""
    case = row_case(rng, device, transform=transform)
    terms = step(**arguments(case, torch.float32))
    ignored = case.target == -100
    assert ignored.any() and not terms.ce[ignored].any() and terms.penalty[ignored].all()
    compare_terms(case, terms)


@pytest.mark.gpu
@pytest.mark.parametrize("step", WAYS, indirect=True)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_option_in_one_launch(step, options, kind, rng, device) -> None:
    case = row_case(rng, device, kind=kind, **options)
    given = arguments(case, torch.float32)
    grad = torch.full_like(given["logits"], torch.nan)
    compare_terms(case, step(**given, grad=grad, **scales(case, torch.float32)))
    compare_gradient(kind, case, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("step", WAYS, indirect=True)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["one pass", "one pass in place", "two passes", "two in place"])
def test_the_ways_to_the_gradient_agree(step, transform, dtype, how, rng, device) -> None:
    """Terms first and gradient later, both at once, into new memory or over the logits."""
    case = row_case(rng, device, transform=transform, dtype=dtype)
    given = arguments(case, dtype)
    norm = step(**given).norm if "two" in how else None
    grad = given["logits"]
    if "place" not in how:
        grad = torch.full_like(grad, torch.nan)
    untouched = given["logits"].clone()
    step(**given, norm=norm, grad=grad, **scales(case, dtype))
    if "place" not in how:
        assert torch.equal(given["logits"], untouched)
    compare_gradient(how, case, grad, factor_for(step, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("step", WAYS, indirect=True)
@pytest.mark.parametrize("vocab", [100, 4096, 4200])
def test_nothing_outside_the_rows_is_read_or_written(step, vocab, rng, device) -> None:
    """The rows lie in a field of NaN, which no result may show and no write may change."""
    case = row_case(rng, device, vocab)
    given = arguments(case, torch.float32)
    field = torch.full((7, vocab + 7), torch.nan, device=device)
    logits = field[1:6, 3 : 3 + vocab]
    logits.copy_(given["logits"])
    terms: RowTerms = step(
        **{**given, "logits": logits}, grad=logits, **scales(case, torch.float32)
    )
    # Not against the same rows elsewhere, bit by bit: where rows are aligned other code runs, whose
    # threads hold other columns, and its sums are rounded in another order.
    compare_terms(case, terms)
    compare_gradient("in a field", case, logits.clone())
    logits.fill_(torch.nan)
    assert field.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("step", WAYS, indirect=True)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("vocab", [4193, 4201, 4208])  # 15, 7 and no columns of padding
def test_padding_is_read_but_not_felt(step, options, vocab, rng, device) -> None:
    """The rows of our workspace are padded to 16 elements; beyond that lies what is not ours."""
    case = row_case(rng, device, vocab, kind="logprob", **options)
    given = arguments(case, torch.float32)
    width = -(-vocab // 16) * 16
    field = torch.full((5, width + 16), torch.nan, device=device)
    field[:, :vocab] = given["logits"]
    logits = field[:, :vocab]
    per_row = scales(case, torch.float32)
    compare_terms(case, step(**{**given, "logits": logits}, padded=True))
    compare_terms(case, step(**{**given, "logits": logits}, grad=logits, **per_row, padded=True))
    compare_gradient("padded", case, logits.clone())
    pad, beyond = field[:, vocab:width], field[:, width:]
    assert beyond.isnan().all()
    assert pad.isnan().all() if step is row_step_torch else not pad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("step", WAYS, indirect=True)
def test_rows_that_are_far_apart(step, rng, device) -> None:
    """Their distance in elements is more than an int32 holds; the memory between is not touched."""
    case = row_case(rng, device, dtype=torch.bfloat16)
    given = arguments(case, torch.bfloat16)
    of_rows = {name: given[name][:2] for name in ("target", "ref")}
    per_row = {name: x[:2] for name, x in scales(case, torch.bfloat16).items()}
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("two rows 2^31 elements apart take 4 GB of a GPU's memory")
    far = torch.empty_strided((2, 4200), (2**31 + 16, 1), dtype=torch.bfloat16, device=device)
    far.copy_(given["logits"][:2])
    norm = step(**{**given, **of_rows, "logits": far}).norm
    found = step(**{**given, **of_rows, "logits": far}, grad=far, **per_row)
    # the second launch may hold the row, and sum it in another order
    torch.testing.assert_close(norm, found.norm, rtol=1e-6, atol=1e-6)
    # against the truth, and not the same rows side by side, which may be aligned otherwise
    compare_terms(case, found, first=2)
    compare_gradient("far apart", case, far.clone(), factor_for(step, torch.bfloat16))


@pytest.mark.parametrize(
    ("vocab", "ids", "itemsize", "options", "how", "sizes"),
    [
        (1, 0, 2, {}, {}, (128, 16, 0, 4, 64)),
        (129, 17, 2, {}, {}, (256, 32, 0, 4, 64)),
        (4096, 256, 4, {}, {}, (4096, 256, 0, 8, 64)),
        (151936, 500, 2, {}, {"one_launch": True}, (4096, 512, 0, 8, 64)),
        (151936, 1024, 2, {}, {"one_launch": True}, (8192, 1024, 0, 16, 64)),
        (151936, 64, 2, {"metrics": True}, {}, (2048, 64, 0, 8, 80)),
        (32768, 64, 2, {}, {}, (4096, 64, 0, 8, 64)),
        (32768, 64, 2, {}, {"one_launch": True}, (4096, 64, 8, 16, 64)),
        (32768, 1000, 2, {}, {"one_launch": True}, (4096, 1024, 8, 16, 128)),
        (32768, 2000, 2, {}, {"one_launch": True}, (16384, 2048, 0, 32, 64)),
        (32001, 64, 2, {"kind": "logprob"}, {"one_launch": True}, (4096, 64, 8, 16, 64)),
        (32769, 64, 2, {}, {"one_launch": True}, (4096, 64, 0, 8, 64)),
        (16384, 64, 4, {}, {"one_launch": True}, (4096, 64, 4, 16, 64)),
        (32768, 64, 4, {}, {"one_launch": True}, (4096, 64, 0, 8, 64)),
        (8192, 64, 2, {"softcap": 30.0}, {"one_launch": True}, (4096, 64, 2, 16, 80)),
        (8193, 64, 2, {"softcap": 30.0}, {"one_launch": True}, (2048, 64, 0, 8, 80)),
        (100, 64, 2, {}, {"one_launch": True}, (1024, 64, 1, 4, 64)),
    ],
)
def test_launch_sizes(vocab, ids, itemsize, options, how, sizes, monkeypatch) -> None:
    monkeypatch.setattr(rows_triton, "THREADS_PER_WARP", 32)
    how = {"one_launch": False, **how}
    assert launch_sizes(vocab, ids, itemsize, RowOptions(**options), **how) == Launch(*sizes)


@pytest.mark.parametrize("ids", [0, 64, 1024, 5000])
@pytest.mark.parametrize("vocab", [1, 1000, 32000, 50257, 262144])
@pytest.mark.parametrize("options", [{}, {"z_loss_weight": 1e-4}])
def test_no_launch_has_more_than_1024_threads(vocab, ids, options, monkeypatch) -> None:
    for threads_per_warp in (32, 64):
        monkeypatch.setattr(rows_triton, "THREADS_PER_WARP", threads_per_warp)
        for one_launch in (False, True):
            sizes = launch_sizes(vocab, ids, 2, RowOptions(**options), one_launch=one_launch)
            assert 4 <= sizes.num_warps <= 1024 // threads_per_warp


@pytest.mark.gpu
@pytest.mark.parametrize("step", WAYS, indirect=True)
@pytest.mark.parametrize("others", [(), (4199,), (0,), (2047,), (2049,), (4110, 4100)])
def test_of_equal_maxima_the_first_is_the_prediction(step, others, rng, device) -> None:
    """The target is in the second block of those that stream; the other maxima are all around."""
    case = row_case(rng, device, metrics=True)
    given = arguments(case, torch.float32)
    given["target"].fill_(2048)
    given["logits"][:, [2048, *others]] = 50.0
    right = not any(column < 2048 for column in others)
    assert step(**given).right.tolist() == [float(right)] * 5
    given["logits"][1, 4150] = 50.5
    assert step(**given).right.tolist() == [float(right and row != 1) for row in range(5)]


# Compiled without a GPU: a sample, of which `python -m bench compile --all` is the whole. 128256 is
# Llama 3's vocabulary, a multiple of 16; 50257 is GPT-2's, odd; 32768 Mistral's, held.
VARIANTS = [
    ("linear", "bfloat16", 128256, 64, "mse", False),
    ("backward", "bfloat16", 128256, 64, "mse", False),
    ("linear", "bfloat16", 32768, 64, "mse", False),
    ("linear", "bfloat16", 50257, 64, "mse", True),
    ("linear", "float32", 16384, 1024, "subset_kl", True),
    ("forward", "bfloat16", 128256, 64, "logprob", True),
    ("backward", "float32", 128256, 1024, "centered", True),
    ("backward", "bfloat16", 50257, 64, "mse", False),
    ("linear", "float16", 128256, 0, "mse", False),
]
SPOILT = [
    (VARIANTS[1], "first barrier"),
    (VARIANTS[0], "second barrier"),
    (VARIANTS[0], "int64"),
]


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    program = Path(__file__).with_name("compile_kernel.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(str_kernels.__file__).parents[1]
    env["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "tests")))
    wanted = [
        ([*v, request.param], without) for v, without in [*((v, None) for v in VARIANTS), *SPOILT]
    ]
    run = subprocess.run(
        [sys.executable, program, json.dumps(wanted)], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


# In the order of accesses: l and s are narrow loads and stores, of single columns; L and S wide
# ones, of the row; b a barrier.
def reads_are_over_before_the_row_is_written(order: str) -> bool:
    """Say whether a barrier stands between the last narrow load and the row's stores."""
    return re.match(r"(?:(?!S).)*b[^lS]*S", order) is not None


def columns_are_written_after_the_row(order: str) -> bool:
    """Say whether a barrier, or the end of the launch, stands between the row and its columns."""
    _, row, rest = order.partition("S")
    return row != "" and re.fullmatch(r"[^s]*(b[^s]*s[^S]*)?", rest) is not None


compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None
    or importlib.util.find_spec("triton.backends.amd") is None,
    reason="this build of Triton lacks the compiler for one of the two makers",
)


@compiles
def test_compiled_for_a_gpu_that_is_not_here(compiled: dict[str, Any]) -> None:
    for variant, code in zip(VARIANTS, compiled["codes"], strict=False):
        seen = (variant, code)
        assert len(code["spills"]) >= 2 and not any(code["spills"].values()), seen
        assert code["narrow_products"] == [], "an index of a large tensor would overflow int32"
        assert 0 < code["registers"] <= 255
        path, _, _, ids, *_ = variant
        if code["aligned"]:
            assert code["row_loads"] > 0 and code["wide_loads"] >= code["row_loads"], seen
            assert (code["row_stores"] > 0) == (path != "forward"), seen
            assert code["wide_stores"] >= code["row_stores"], seen
            if path == "linear" or (path == "backward" and ids):
                assert reads_are_over_before_the_row_is_written(code["order"]), seen
            if path != "forward" and ids:
                assert columns_are_written_after_the_row(code["order"]), seen
        else:  # the check of the widths can fail
            assert code["wide_loads"] < code["row_loads"], seen


@compiles
def test_what_is_left_out_of_the_source_is_missed(compiled: dict[str, Any]) -> None:
    no_first, no_second, narrow = compiled["codes"][len(VARIANTS) :]
    assert not reads_are_over_before_the_row_is_written(no_first["order"])
    if "private_segment_fixed_size" not in no_second["spills"]:  # AMD's are a second launch
        assert not columns_are_written_after_the_row(no_second["order"])
    assert narrow["narrow_products"] != []


@compiles
def test_a_run_compiles_each_launch_once(compiled: dict[str, Any]) -> None:
    """Whatever changes between its steps: weights, counts, rows, chunks, upstream gradients."""
    for without, rows in compiled["runs"]:
        for row in rows:
            assert row["launches"] > 10
            if without is None:
                assert row["codes"] == row["expected_codes"] <= 3, row
        if without is not None:  # and the check can fail
            assert any(row["codes"] > row["expected_codes"] for row in rows), without
