"""Kernels with a fault that the interpreter cannot show: executed, each is seen.

Of a process whose kernels are not interpreted: test_ptx_in_ci.py runs a sample, `make ptx` all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from shipped import TARGET, execute
from test_mutants import load

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
FIRST = "        tl.debug_barrier()  # every warp has read its single columns\n"
SECOND = "            tl.debug_barrier()  # other threads of this program wrote these columns"
LOAD = "tl.load(Logits + start + offs, mask=start + offs < v_padded"
STORE = "tl.store(Grad + at, du, mask=at < v_padded"


class Mutant(NamedTuple):
    what: str
    variant: Variant
    old: str
    new: str
    seen: str  # in the message
    of: int = 1  # in how many places the old text stands; the last one is replaced

    def __str__(self) -> str:
        return self.what


MUTANTS = [
    Mutant("no first barrier", IN_PLACE, FIRST, "        pass\n", "warps: a .* a race"),
    Mutant("no second barrier, held", HELD, SECOND, "#", "global, warps: .* a race"),
    Mutant("no second barrier, streamed", STREAMED, SECOND, "#", "global, warps: .* a race"),
    *(
        Mutant(
            f"a {what} past the row, {name}",
            variant,
            old,
            old.replace("<", "<="),
            f"{opcode}.* out of bounds, just past|blocks: a write .* a race",  # into the next row
        )
        for name, variant in (("held", HELD), ("streamed", STREAMED))
        for what, old, opcode in (("load", LOAD, "ld.global"), ("store", STORE, "st.global"))
    ),
    Mutant(
        "an id past the last",
        HELD,
        "mask_k = offs_k < K",
        "mask_k = offs_k <= K",
        "ld.global.* out of bounds",
    ),
    Mutant(
        "a false alignment",
        HELD,
        LOAD,
        LOAD.replace("start +", "tl.multiple_of(v_padded - 5007, 16) + start +", 1),  # which is 1
        "misaligned access of 16 bytes",
    ),
    Mutant(
        "the norm of the next row",
        HELD,
        "tl.store(Norm + pid_n, m)",
        "tl.store(Norm + pid_n + 1, m)",
        "blocks: a write .* a race",
    ),
    Mutant(
        "two rows in one term",
        HELD,
        "Terms += pid_n\n",
        "Terms += pid_n // 2\n",
        "blocks: a write .* a race",
    ),
    Mutant(
        "read back without a barrier",
        HELD._replace(kind="logprob"),
        "    lse = m + log_d\n",
        "    lse = tl.load(Norm + pid_n) + log_d\n",
        "nobody has written|a race",
    ),
]


def settings() -> Settings:
    return Settings(target=TARGET)


def spoilt(mutant: Mutant, folder: Path, monkeypatch) -> None:
    """Let rows_triton launch the mutant."""
    source = Path(row_kernel.__file__).read_text(encoding="utf-8")
    assert source.count(mutant.old) == mutant.of, f"{source.count(mutant.old)} of {mutant.old!r}"
    kernels = load("row_kernel", folder, (source, mutant.new.join(source.rsplit(mutant.old, 1))))
    monkeypatch.setattr(rows_triton, "row_step_kernel", kernels.row_step_kernel)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_of_the_kernel_is_seen(mutant: Mutant, rng, tmp_path, monkeypatch) -> None:
    spoilt(mutant, tmp_path, monkeypatch)
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
    old = "pid_n = tl.program_id(0).to(tl.int64)"
    mutant = Mutant("int32", HELD, old, "pid_n = tl.program_id(0)", "")
    spoilt(mutant, tmp_path, monkeypatch)
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


# Of each program every barrier is taken out in turn. One may be missing unseen, FIRST, where a sum
# or maximum stands between the reads of single columns and the row's stores: its own barriers part
# them. On the linear path there are always some, in the first pass; in backward only where a kind
# sums over the ids ("no first barrier" above is one that does not).
PROGRAMS = [
    Variant("linear", "bfloat16", 32000, 64, "mse", False, TARGET),
    Variant("backward", "float32", 5008, 64, "mse", False, TARGET),
    Variant("evaluation", "float32", 32001, 64, "logprob", True, TARGET),
    Variant("backward", "float32", 32001, 64, "centered", False, TARGET),
    Variant("linear", "bfloat16", 32768, 64, "coarse_kl", False, TARGET),
    Variant("linear", "bfloat16", 49152, 64, "subset_kl", True, TARGET),
]
NEEDS_FIRST = PROGRAMS[1]


@pytest.mark.parametrize("variant", PROGRAMS if EVERY else PROGRAMS[:2])
def test_every_barrier_is_missed(variant: Variant, rng) -> None:
    state = rng.get_state()
    whole = execute(variant, rng, settings(), in_place=True).machine.program
    barriers = [pc for pc, i in enumerate(whole.code) if i.opcode.startswith("bar")]
    lines = Path(row_kernel.__file__).read_text(encoding="utf-8").splitlines()
    unseen = []
    for pc in barriers:
        rng.set_state(state)
        without = settings()
        without.edit = lambda program, pc=pc: program.without(pc)
        try:
            execute(variant, rng, without, in_place=True)
        except (Fault, DataRace):
            continue
        unseen.append(f"{lines[whole.code[pc].line - 1]}\n")
    assert len(barriers) > 1
    assert unseen == ([] if variant == NEEDS_FIRST or variant.path == "evaluation" else [FIRST])
