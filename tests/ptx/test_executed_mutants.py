"""Kernels with a fault that the interpreter cannot show: executed, each is seen.

Of a process whose kernels are not interpreted: test_ptx_in_ci.py runs a sample, `make ptx` all.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from shipped import TARGET, execute
from spoilt_source import (
    NARROW_ROW_INDEX,
    NO_FIRST_BARRIER,
    NO_SECOND_BARRIER,
    Change,
    load_changed,
)

from bench.compiled.compiling import Variant
from bench.ptx.launcher import DataRace, Settings, executing
from bench.ptx.memory import Fault
from str_kernels.op.contracts import RowOptions
from str_kernels.op.rows import row_kernel, rows_triton

EVERY = os.environ.get("STR_PTX_CODES") == "every"
HELD = Variant("linear", "float32", 5008, 20, "mse", False, TARGET)
STREAMED = Variant("linear", "bfloat16", 40000, 20, "mse", False, TARGET)
IN_PLACE = Variant("backward", "float32", 5008, 20, "mse", False, TARGET)
UNALIGNED = Variant("forward", "float32", 5001, 20, "mse", False, TARGET)


class Mutant(NamedTuple):
    what: str
    variant: Variant
    change: Change
    seen: str  # in the message

    def __str__(self) -> str:
        return self.what


MUTANTS = [
    Mutant("no first barrier", IN_PLACE, NO_FIRST_BARRIER, "warps: a .* a race"),
    Mutant("no second barrier, held", HELD, NO_SECOND_BARRIER, "global, warps: .* a race"),
    Mutant("no second barrier, streamed", STREAMED, NO_SECOND_BARRIER, "global, warps: .* a race"),
    *(
        Mutant(
            f"a {what} past the row, {name}",
            variant,
            Change(f"{inside} < v_padded", f"{inside} <= v_padded"),
            f"{opcode}.* out of bounds, just past|blocks: a write .* a race",  # into the next row
        )
        for name, variant in (("held", HELD), ("streamed", STREAMED))
        for what, inside, opcode in (
            ("load", "start + offs", "ld.global"),
            ("store", "at", "st.global"),
        )
    ),
    Mutant(
        "an id past the last",
        HELD,
        Change("mask_k = offs_k < K", "mask_k = offs_k <= K"),
        "ld.global.* out of bounds",
    ),
    Mutant(
        "a false alignment",
        HELD,
        Change(
            "tl.load(Logits + start + offs, mask=start + offs < v_padded, other=0)",
            "tl.load(Logits + tl.multiple_of(v_padded - 5007, 16) + start + offs, "  # which is 1
            "mask=start + offs < v_padded, other=0)",
        ),
        "misaligned access of 16 bytes",
    ),
    Mutant(
        "the norm of the next row",
        HELD,
        Change("tl.store(Norm + pid_n, m)", "tl.store(Norm + pid_n + 1, m)"),
        "blocks: a write .* a race",
    ),
    Mutant(
        "two rows in one term",
        HELD,
        Change("Terms += pid_n", "Terms += pid_n // 2"),
        "blocks: a write .* a race",
    ),
    Mutant(
        "read back without a barrier",
        HELD._replace(kind="logprob"),
        Change("lse = m + log_d", "lse = tl.load(Norm + pid_n) + log_d"),
        "nobody has written|a race",
    ),
]


def settings() -> Settings:
    return Settings(target=TARGET)


def launch_changed(change: Change, folder: Path, monkeypatch) -> None:
    """Let rows_triton launch the changed kernel."""
    kernels = load_changed(row_kernel.__name__, folder, change)
    monkeypatch.setattr(rows_triton, "row_step_kernel", kernels.row_step_kernel)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_of_the_kernel_is_seen(mutant: Mutant, rng, tmp_path, monkeypatch) -> None:
    launch_changed(mutant.change, tmp_path, monkeypatch)
    with pytest.raises((Fault, DataRace), match=mutant.seen):
        execute(mutant.variant, rng, settings(), in_place=True)


@pytest.mark.parametrize("variant", [HELD, STREAMED, IN_PLACE, UNALIGNED])
def test_the_kernel_as_it_is_has_none_of_them(variant: Variant, rng) -> None:
    execute(variant, rng, settings(), in_place=True)


def far_apart() -> None:
    logits = torch.empty_strided((3, 400), (2**30 + 16, 1), dtype=torch.bfloat16)
    logits.copy_(torch.zeros(3, 400))
    nothing = torch.empty(3, 0)
    ids = torch.empty(0, dtype=torch.int64)
    target = torch.zeros(3, dtype=torch.int64)
    with executing(settings()):
        rows_triton.row_step_triton(
            logits, target, ids, None, nothing, torch.empty(0), RowOptions()
        )


def test_a_row_index_of_32_bits_is_seen(tmp_path, monkeypatch) -> None:
    far_apart()
    launch_changed(NARROW_ROW_INDEX, tmp_path, monkeypatch)
    with pytest.raises(Fault, match="out of bounds"):
        far_apart()


def test_a_pad_that_is_not_there_is_seen() -> None:
    logits = torch.zeros(3, 301)
    given: Any = (
        torch.zeros(3, dtype=torch.int64), torch.arange(4), None, torch.zeros(3, 4), torch.ones(4),
        RowOptions(),
    )  # fmt: skip
    with executing(settings()):
        rows_triton.row_step_triton(logits, *given)
        with pytest.raises(Fault, match="out of bounds"):
            rows_triton.row_step_triton(logits, *given, padded=True)


# Of each program every barrier is taken out in turn. One may be missing unseen, the first of the
# source, where a sum or maximum stands between the reads of single columns and the row's stores:
# its own barriers part them. On the linear path there are always some, in the first pass; in
# backward only where a kind sums over the ids ("no first barrier" above is one that does not).
PROGRAMS = [
    Variant("linear", "bfloat16", 32000, 64, "mse", False, TARGET),
    Variant("backward", "float32", 5008, 64, "mse", False, TARGET),
    Variant("evaluation", "float32", 32001, 64, "logprob", True, TARGET),
    Variant("backward", "float32", 32001, 64, "centered", False, TARGET),
    Variant("linear", "bfloat16", 32768, 64, "coarse_kl", False, TARGET),
    Variant("linear", "bfloat16", 49152, 64, "subset_kl", True, TARGET),
]
NEEDS_FIRST = PROGRAMS[1]


def first_barrier() -> int:
    """Return the line of the first barrier that the source asks for."""
    tree = ast.parse(Path(row_kernel.__file__).read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return min(call.lineno for call in calls if ast.unparse(call) == "tl.debug_barrier()")


@pytest.mark.parametrize("variant", PROGRAMS if EVERY else PROGRAMS[:2])
def test_every_barrier_is_missed(variant: Variant, rng) -> None:
    state = rng.get_state()
    whole = execute(variant, rng, settings(), in_place=True).machine.program
    barriers = [pc for pc, i in enumerate(whole.code) if i.opcode.startswith("bar")]
    unseen = []
    for pc in barriers:
        rng.set_state(state)
        without = settings()
        without.edit = lambda program, pc=pc: program.without(pc)
        try:
            execute(variant, rng, without, in_place=True)
        except (Fault, DataRace):
            continue
        unseen.append(whole.code[pc].line)
    assert len(barriers) > 1
    needs_every = variant == NEEDS_FIRST or variant.path == "evaluation"
    assert unseen == ([] if needs_every else [first_barrier()])
