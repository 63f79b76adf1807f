"""The cases of test_parallel.py, and what runs of them on each rank.

Sizes: V = 131 is divided by no number of ranks; "empty" leaves some ranks none of it; 3 rows a
chunk, so that there are several, the last one ragged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import KINDS, SEED_VARIABLE, Case, Result, detached, generator_of, make_case, pairwise
from ranks import counted_bytes, poisoned_memory

from str_kernels import safety_linear_cross_entropy
from str_kernels.op import parallel
from str_kernels.op.functional import safety_log_probs
from str_kernels.op.projection import project

VOCAB, ROWS, DIM, IDS, RANK = 131, 11, 24, 5, 3
OF_HEAD = ("linear_weight", "linear_bias", "low_rank_b")
SIZES = {
    (2, "torch"): [66, 65],
    (2, "own"): [17, 114],
    (2, "empty"): [131, 0],
    (4, "torch"): [33, 33, 33, 32],
    (4, "own"): [1, 100, 7, 23],
    (4, "empty"): [0, 61, 70, 0],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["fp64"] = torch.float64
OPTIONS: dict[str, list[Any]] = {
    "ranks": [2, 4],
    "split": ["torch", "own", "empty"],
    "dtype": list(DTYPES),
    "path": ["linear", "linear+bias", "linear+lora"],
    "kind": list(KINDS),
    "ids": [None, 0, 5],
    "transform": ["none", "scale+cap"],
    "ref": ["row", "shared"],
    "safety_rows": ["default", "weights"],
    "ce_rows": ["default", "weights"],
    "id_weights": [False, True],
    "label_smoothing": [0.0, 0.2],
    "z_loss_weight": [0.0, 0.01],
    "metrics": [False, True],
    "pack_rows": [None, False],
    "counts": ["default", "tensors"],
    "reduction": ["mean", "sum", "none"],
}
COMBINATIONS = list(pairwise(OPTIONS, lambda _: True))
# Where a mutant has to show, and the bytes are counted.
PLAIN = {"ranks": 4, "split": "torch", "dtype": "fp32", "path": "linear+lora", "kind": "logprob"}
PLAIN |= {"ids": IDS, "metrics": True, "label_smoothing": 0.2, "pack_rows": False}


def case_of(name: str, options: dict[str, Any]) -> tuple[Case, list[int]]:
    options = dict(options)
    ranks, split = options.pop("ranks"), options.pop("split")
    dtype = DTYPES[options.pop("dtype")]
    rng = generator_of(os.environ[SEED_VARIABLE], name)
    case = make_case(
        rng, torch.device("cpu"), rows=ROWS, vocab=VOCAB, dim=DIM, rank=RANK, dtype=dtype, **options
    )
    sizes = SIZES[ranks, split]
    padded = -(-(max(sizes) + 1) // 16) * 16
    return case.with_options(chunk_bytes=3 * padded * dtype.itemsize), sizes


CASES = {f"{i}": case_of(f"parallel {i}", options) for i, options in enumerate(COMBINATIONS)}
CASES["plain"] = case_of("parallel plain", PLAIN)


# What runs on the ranks.


def split(case: Case, sizes: list[int], rank: int) -> Case:
    parts = {name: x.split(sizes)[rank] for name, x in case.leaves.items() if name in OF_HEAD}
    return case.with_leaves(**parts)


def groups() -> dict[int, Any]:
    """Return this rank's group of 2 (0 and 1, or 2 and 3) and of 4."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}


def run_case(case: Case, sizes: list[int], group: Any) -> tuple[Result, dict[str, int]]:
    own = split(case, sizes, group.rank()).with_options(process_group=group)
    with counted_bytes() as counted:
        return own.run("auto"), counted


def run_mutant(case: Case, sizes: list[int], group: Any, owner: Any, name: str, new: Any) -> Result:
    old = vars(owner)[name]
    setattr(owner, name, new)
    try:
        return run_case(case, sizes, group)[0]
    finally:
        setattr(owner, name, old)


def _ids_not_shifted(shard: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.where((ids >= 0) & (ids < shard.width), ids, shard.width)


def _own_rows_alone(shard: Any, own: Any) -> Any:
    return own


def _not_summed(shard: Any, values: torch.Tensor) -> torch.Tensor:
    return values


def _no_rescale(shard: Any, own: Any) -> Any:
    found = _WHOLE(shard, own)
    return found._replace(log_total=found.log_total + 1e-3)


def _dx_not_summed(shard: Any, values: torch.Tensor) -> torch.Tensor:
    return values if values.shape[-1] == DIM else _SUM(shard, values)


def _own_z_y(shard: Any, own: Any) -> Any:
    return _WHOLE(shard, own)._replace(z_y=own.z_y)


_SUM = parallel.VocabShard.sum_over_ranks_
_WHOLE = parallel.VocabShard.whole_rows
MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ids not shifted": ("columns", _ids_not_shifted),
    "the norm of this rank alone": ("whole_rows", _own_rows_alone),
    "0.1 % of the norm": ("whole_rows", _no_rescale),
    "neither dX nor z_S summed": ("sum_over_ranks_", _not_summed),
    "dX not summed": ("sum_over_ranks_", _dx_not_summed),
    "the target's logit of this rank alone": ("whole_rows", _own_z_y),
}


def on_a_rank(cases: dict[str, tuple[Case, list[int]]]) -> dict[str, Any]:
    """Run everything; the parent compares."""
    mine = groups()
    found: dict[str, Any] = {}
    with poisoned_memory():
        for name, (case, sizes) in cases.items():
            found[name] = run_case(case, sizes, mine[len(sizes)])
        plain, sizes = cases["plain"]
        for name, (method, new) in MUTANTS.items():
            owner = parallel.VocabShard
            found[name] = run_mutant(plain, sizes, dist.group.WORLD, owner, method, new)
        found["errors"] = errors(plain, sizes)
        found["equal"] = project_and_log_probs(plain, sizes)
        found["dtensor"] = with_dtensors(plain, mine[2])
        for name, (case, sizes) in edges().items():
            found[name] = run_case(case, sizes, mine[len(sizes)])[0]
        found["autocast"] = under_autocast(plain, sizes)
    return found


def edges() -> dict[str, tuple[Case, list[int]]]:
    """Return cases that are compared with one process, since their numbers are not finite."""
    options = {"ranks": 4, "split": "torch", "dtype": "fp32", "path": "linear+bias", "ids": IDS}
    options |= {"metrics": True, "kind": "logprob"}
    case, sizes = case_of("edges", options)
    masked = case.leaves["linear_bias"].clone()
    masked[33:66] = -torch.inf  # all that rank 1 has
    kept = (case.target < 33) | (case.target >= 66)
    ids = torch.tensor([2, 80, 130])
    assert case.ref is not None
    for_three = case.changed(target=torch.where(kept, case.target, 7), ids=ids, ref=case.ref[:, :3])
    without = {"masked": for_three.with_leaves(linear_bias=masked)}
    without["nothing kept"] = case.changed(target=torch.full_like(case.target, -100))
    hidden = case.leaves["hidden"].clone()
    hidden[2] = torch.nan
    ignored = case.target.clone()
    ignored[2] = -100
    without["a row of NaN"] = case.with_leaves(hidden=hidden)
    without["NaN where ignored"] = without["a row of NaN"].changed(target=ignored)
    without["no rows"] = case.rows(slice(0, 0))
    return {name: (case, sizes) for name, case in without.items()}


def errors(case: Case, sizes: list[int]) -> dict[str, str]:
    """Return what each bad call raised; a rank that hangs instead ends the test."""
    group = dist.group.WORLD
    case = split(case, sizes, group.rank())
    high, low = case.target.clone(), case.target.clone()
    high[4], low[4] = VOCAB, -1
    ids = torch.tensor([0, VOCAB])
    calls: dict[str, Callable[[], Any]] = {
        "high": lambda: case.changed(target=high).with_options(process_group=group).run("torch"),
        "low": lambda: case.changed(target=low).with_options(process_group=group).run("torch"),
        "ids": lambda: project(torch.zeros(2, DIM), case.leaves["linear_weight"], ids,
                               process_group=group),
        "ids of the loss": lambda: case.changed(ids=torch.tensor([0, 1, 2, 3, VOCAB]))
        .with_options(process_group=group)
        .run("torch"),
        "group": lambda: case.with_options(process_group="world").run("torch"),
        **{
            backend: lambda name=backend: case.with_options(process_group=group).run(name)
            for backend in ("eager", "compiled", "triton")
        },
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def project_and_log_probs(case: Case, sizes: list[int]) -> dict[str, Any]:
    """Compute the references, with the gradient of `project`."""
    group = dist.group.WORLD
    own = split(case, sizes, group.rank())
    leaves = {name: x.detach().requires_grad_() for name, x in own.leaves.items()}
    hidden, weight = leaves["hidden"], leaves["linear_weight"]
    options = {"low_rank": (leaves["low_rank_t"], leaves["low_rank_b"]), "logit_scale": 1.3}
    options |= {"softcap": 5.0, "process_group": group}
    z = project(hidden, weight, case.ids, **options)
    z.square().sum().backward()
    log_probs = safety_log_probs(hidden, weight, case.ids, **options)
    return {"z": z.detach(), "log_probs": log_probs, **{n: x.grad for n, x in leaves.items()}}


def with_dtensors(case: Case, other: Any) -> dict[str, Any]:
    """Run the case with a head of DTensors, and return whole gradients."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    leaves = {
        name: (distribute_tensor(x, mesh, [Shard(0)]) if name in OF_HEAD else x)
        for name, x in case.leaves.items()
    }
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    terms = case.loss(leaves, "torch")
    terms.loss.backward(case.cotangent(terms.loss))
    assert isinstance(leaves["linear_weight"].grad, DTensor)
    assert leaves["linear_weight"].grad.placements == (Shard(0),)
    grads = {
        name: x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad
        for name, x in leaves.items()
    }
    ids = case.ids
    z = project(leaves["hidden"], leaves["linear_weight"], ids)
    refused = {}
    spread = distribute_tensor(case.leaves["linear_weight"], mesh, [Replicate()])
    for name, options in {
        "another group": {"linear_weight": leaves["linear_weight"], "process_group": other},
        "replicated": {"linear_weight": spread},
    }.items():
        try:
            safety_linear_cross_entropy(leaves["hidden"], target=case.target, **options)
        except ValueError as error:
            refused[name] = str(error)
    return {"result": Result(detached(terms), grads), "z": z.detach(), "refused": refused}


def under_autocast(case: Case, sizes: list[int]) -> Result:
    group = dist.group.WORLD
    own = split(case, sizes, group.rank()).with_options(process_group=group)
    return own.run("torch", autocast=torch.bfloat16)


def in_a_graph(case: Case) -> Result:
    """Compile the case with a head of DTensors into one graph."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    leaves = {
        name: (distribute_tensor(x, mesh, [Shard(0)]) if name in OF_HEAD else x)
        for name, x in case.leaves.items()
    }
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    compiled = torch.compile(case.loss, backend="aot_eager", fullgraph=True)
    terms = compiled(leaves, "torch")
    terms.loss.backward(case.cotangent(terms.loss))
    grads = {n: x.grad.full_tensor() if n in OF_HEAD else x.grad for n, x in leaves.items()}
    return Result(detached(terms), grads)
