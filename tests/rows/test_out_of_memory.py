"""Out of memory in the loss's workspace: half the rows at a time, once, and then a clear error."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import warnings
import weakref
from typing import Any

import pytest
import torch

from str_kernels import SafetyPenalty, safety_linear_cross_entropy
from str_kernels.op import chunks

_ROWS, _WIDTH, _VOCAB, _IDS = 24, 8, 50, 3


def _problem(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(_ROWS, _WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(_VOCAB, _WIDTH, generator=generator).requires_grad_()
    target = torch.randint(0, _VOCAB, (_ROWS,), generator=generator)
    ids = torch.randperm(_VOCAB, generator=generator)[:_IDS]
    return hidden, weight, target, ids, torch.randn(_ROWS, _IDS, generator=generator)


def _limit(monkeypatch: pytest.MonkeyPatch, rows: int, error: type[Exception] | str) -> list[int]:
    """Let the workspace fail above so many rows; returns what was asked for."""
    make, asked = chunks._workspace, []

    def limited(hidden: Any, vocab: int, count: int, dtype: Any) -> Any:
        asked.append(count)
        if count > rows:
            if isinstance(error, str):
                raise RuntimeError(error)
            raise error("CUDA out of memory")
        return make(hidden, vocab, count, dtype)

    monkeypatch.setattr(chunks, "_workspace", limited)
    return asked


_BYTES = 16 * 64 * 4  # 16 rows of 50 logits, padded


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        MemoryError,
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried",
        "could not create a primitive",  # oneDNN
        "MPS backend out of memory (MPS allocated: 9.05 GB)",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ],
)
def test_half_the_rows_are_tried_and_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    problem = _problem(torch.seed() % 2**31)
    expected = safety_linear_cross_entropy(*problem, chunk_bytes=_BYTES // 2)
    wanted = torch.autograd.grad(expected.loss, problem[:2])
    asked = _limit(monkeypatch, 8, error)
    with pytest.warns(UserWarning, match=rf"trying half. Set chunk_bytes={_BYTES // 2} to"):
        found = safety_linear_cross_entropy(*problem, chunk_bytes=_BYTES)
    assert asked == [16, 8]
    assert torch.equal(found.loss, expected.loss)
    # the head's gradient too: what the first attempt added to it is not in it
    for got, want in zip(torch.autograd.grad(found.loss, problem[:2]), wanted, strict=True):
        assert torch.equal(got, want)


def test_the_first_attempt_is_gone_before_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made, alive = chunks._workspace, [], []

    def watched(*args: Any) -> Any:
        alive.append([one for one in made if one() is not None])
        workspace = make(*args)
        made.append(weakref.ref(workspace))
        return workspace

    def no_room(*args: Any) -> None:
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(*args)

    add = chunks._add_grads
    monkeypatch.setattr(chunks, "_workspace", watched)
    monkeypatch.setattr(chunks, "_add_grads", no_room)
    gc.disable()  # a traceback in a cycle would hold it too
    try:
        with pytest.warns(UserWarning, match="out of memory"):
            safety_linear_cross_entropy(*_problem(1), chunk_bytes=_BYTES)
    finally:
        gc.enable()
    assert alive == [[], []]


@pytest.mark.parametrize("kind", ["mse", "coarse_kl"])  # whose logits are twice as wide
def test_of_packed_rows_those_that_take_part_count(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    hidden, weight, target, ids, ref = _problem(5)
    target[10:] = -100
    problem = [hidden.bfloat16(), weight.bfloat16(), target, ids, ref.log_softmax(-1)]
    asked = _limit(monkeypatch, 5, torch.OutOfMemoryError)
    with pytest.warns(UserWarning, match="out of memory with 10 rows"):
        safety_linear_cross_entropy(
            *problem, penalty=SafetyPenalty(0.1, kind), chunk_bytes=1 << 20, pack_rows=True
        )
    assert asked == [10, 5]


def test_a_rank_of_a_vocabulary_does_not_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are where the ranks meet: the others have as many as before."""
    calls = []

    def no_room(*args: Any) -> None:
        calls.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chunks, "_in_chunks", no_room)
    plan, shard = chunks.Plan(16, False, (True,) * 5), object()
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        chunks.linear_terms_and_grads(None, None, None, plan, None, None, shard)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_another_error_of_the_second_attempt_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such kernel")])
    monkeypatch.setattr(chunks, "_workspace", lambda *_: (_ for _ in ()).throw(next(errors)))
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(RuntimeError, match=r"^no such kernel$"),
    ):
        safety_linear_cross_entropy(*_problem(0), chunk_bytes=_BYTES)


def test_memory_that_runs_out_late_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(3)
    expected = safety_linear_cross_entropy(*problem, chunk_bytes=_BYTES // 2)
    wanted = torch.autograd.grad(expected.loss, problem[:2])
    add, calls = chunks._add_grads, []

    def late(*args: Any) -> None:
        calls.append(1)
        add(*args)
        if len(calls) == 2:  # the last chunk of the first attempt, its gradient added
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chunks, "_add_grads", late)
    with pytest.warns(UserWarning, match="out of memory"):
        found = safety_linear_cross_entropy(*problem, chunk_bytes=_BYTES)
    for got, want in zip(torch.autograd.grad(found.loss, problem[:2]), wanted, strict=True):
        assert torch.equal(got, want)


def test_a_second_failure_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _limit(monkeypatch, 4, torch.OutOfMemoryError)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match=rf"`chunk_bytes` must .*{_BYTES // 2:,} bytes"),
    ):
        safety_linear_cross_entropy(*_problem(0), chunk_bytes=_BYTES)
    assert asked == [16, 8]


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _limit(monkeypatch, 4, "expected scalar type")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="expected scalar type"):
            safety_linear_cross_entropy(*_problem(0), chunk_bytes=_BYTES)
    assert asked == [16]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_in_a_process_that_really_has_no_more() -> None:
    """1 GB of logits do not fit, half of them do."""
    program = """
        import resource, warnings, torch
        from str_kernels import safety_linear_cross_entropy
        torch.set_num_threads(1)
        made = [torch.randn(4096, 4).requires_grad_(), torch.randn(65536, 4)]
        rest = torch.zeros(4096, dtype=torch.int64), torch.tensor([1]), torch.zeros(4096, 1)
        safety_linear_cross_entropy(*made, *rest, chunk_bytes=1 << 20).loss.backward()
        wanted, made[0].grad = made[0].grad, None
        size = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + (700 << 20),) * 2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            safety_linear_cross_entropy(*made, *rest, chunk_bytes=1 << 30).loss.backward()
        torch.testing.assert_close(made[0].grad, wanted)
        print([str(one.message)[:60] for one in said])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory with 4,096 rows of logits at a time" in done.stdout
