"""Inputs for both functions: random, with the awkward rows always among them."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from str_kernels import (
    SafetyLoss,
    SafetyPenalty,
    safety_cross_entropy,
    safety_linear_cross_entropy,
)

SEED_VARIABLE = "STR_TEST_SEED"
PENALTY_WEIGHT = 0.3
DRIFT = 0.5  # standard deviation of reference minus student, logits
SOFTCAP = 5.0  # logits of deviation 1 cap: both branches of the kernel's tanh are taken
SCALE = 1.3


@dataclass(frozen=True)
class Result:
    terms: SafetyLoss
    grads: dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """One call of one of the two functions, and the gradient that reaches its loss."""

    leaves: dict[str, Tensor]  # {"logits"} or {"hidden", "linear_weight", maybe "linear_bias"}
    target: Tensor  # (N,)
    ids: Tensor | None  # (K,)
    ref: Tensor | None  # (N, K) or (K,)
    options: dict[str, Any]  # keyword arguments of the function
    upstream: float
    frozen: frozenset[str] = frozenset()  # leaves that take no gradient

    @property
    def linear(self) -> bool:
        return "hidden" in self.leaves

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    def changed(self, **fields: Any) -> Case:
        return replace(self, **fields)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def with_leaves(self, **leaves: Tensor) -> Case:
        return replace(self, leaves={**self.leaves, **leaves})

    def rows(self, part: slice | Tensor) -> Case:
        """Return the case of some rows; counts stay, since they may be those of all rows."""
        options = dict(self.options)
        for name in ("safety_row_weight", "ce_row_weight"):
            if options.get(name) is not None:
                options[name] = options[name][part]
        of_row = "hidden" if self.linear else "logits"
        ref = self.ref[part] if self.ref is not None and self.ref.dim() == 2 else self.ref
        leaves = {**self.leaves, of_row: self.leaves[of_row][part]}
        return replace(self, leaves=leaves, target=self.target[part], ref=ref, options=options)

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """Return the same numbers in another dtype: float64 of them is the truth."""
        return replace(self, leaves={name: x.to(dtype) for name, x in self.leaves.items()})

    def live_leaves(self) -> dict[str, Tensor]:
        return {
            name: x.detach().requires_grad_(name not in self.frozen)
            for name, x in self.leaves.items()
        }

    def loss(self, leaves: Mapping[str, Tensor], backend: str) -> SafetyLoss:
        options = {**self.options, "backend": backend}
        if backend == "eager":
            options.pop("inplace", None)
        if self.linear:
            return safety_linear_cross_entropy(
                leaves["hidden"],
                leaves["linear_weight"],
                self.target,
                self.ids,
                self.ref,
                linear_bias=leaves.get("linear_bias"),
                **options,
            )
        return safety_cross_entropy(leaves["logits"], self.target, self.ids, self.ref, **options)

    def run(self, backend: str, autocast: torch.dtype | None = None) -> Result:
        """Run forward, under autocast if asked to, and backward, outside it as torch advises."""
        leaves = self.live_leaves()
        kind = self.target.device.type
        with torch.autocast(kind, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            terms = self.loss(leaves, backend)
        terms.loss.backward(torch.full_like(terms.loss, self.upstream))
        return Result(
            SafetyLoss(*(x.detach() for x in terms)), {name: x.grad for name, x in leaves.items()}
        )

    def raw_logits(self) -> Tensor:  # (N, V)
        if not self.linear:
            return self.leaves["logits"]
        return torch.nn.functional.linear(*self.leaves.values())


def generator_of(seed: str, test: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {test}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def make_case(
    rng: torch.Generator,
    device: torch.device,
    *,
    path: str = "logits",  # "linear", "linear+bias"
    dtype: torch.dtype = torch.float32,
    rows: int = 7,
    vocab: int = 301,
    ids: int | None = 5,  # None: no safety ids at all
    dim: int = 24,
    transform: str = "none",  # "scale", "cap", "scale+cap"
    ref: str = "row",  # "shared"
    ref_dtype: torch.dtype = torch.float32,
    safety_rows: str = "default",  # "mask", "weights"
    ce_rows: str = "default",  # "weights"
    id_weights: bool = False,
    counts: str = "default",  # "numbers", "tensors"
    reduction: str = "mean",
    penalty_weight: str = "number",  # "tensor"
    ignore_index: int = -100,
) -> Case:
    """Draw a case. Rows 0, 1, 2 have the targets 0, V - 1, S_0; a quarter of the others none."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
    scale = SCALE if "scale" in transform else 1.0
    deviation = (SOFTCAP if "cap" in transform else 3.0) / scale
    options["logit_scale"] = scale
    options["softcap"] = SOFTCAP if "cap" in transform else None

    target = torch.randint(vocab, (rows,), generator=rng)
    safety_ids = torch.randperm(vocab, generator=rng)[: ids or 0]
    special = [0, vocab - 1, *safety_ids[:1].tolist()][:rows]
    target[: len(special)] = torch.tensor(special, dtype=torch.int64)

    if path == "logits":
        leaves = {"logits": deviation * normal(rows, vocab)}
        # Every third row is sure of its target: p_y near 1 is where p_y - 1 cancels.
        leaves["logits"][torch.arange(0, rows, 3), target[::3]] += 5 * deviation
    else:
        leaves = {"hidden": normal(rows, dim), "linear_weight": normal(vocab, dim)}
        leaves["linear_weight"] *= deviation / dim**0.5
        if path == "linear+bias":
            leaves["linear_bias"] = 0.5 * normal(vocab)
    ignored = uniform(rows) < 0.25
    ignored[: len(special)] = False
    target[ignored] = ignore_index
    leaves = {name: x.to(device, dtype) for name, x in leaves.items()}

    if safety_rows != "default":  # drawn without a look at the targets
        on = (uniform(rows) < 0.6).float()
        on[:1] = 1.0
        options["safety_row_weight"] = on if safety_rows == "mask" else on * (0.1 + uniform(rows))
    if ce_rows == "weights":
        on = (uniform(rows) < 0.7).float()
        on[:1] = 1.0
        options["ce_row_weight"] = on * (0.1 + uniform(rows))
    if counts != "default":
        numbers = {"num_items": 2 * rows + 3, "num_safety_items": 1.5 * rows + 0.25}
        as_given = torch.tensor if counts == "tensors" else float
        options.update({name: as_given(value) for name, value in numbers.items()})
    penalty_options: dict[str, Any] = {"weight": PENALTY_WEIGHT}
    if penalty_weight == "tensor":
        penalty_options["weight"] = torch.tensor(PENALTY_WEIGHT)
    if id_weights and ids:
        penalty_options["id_weights"] = 2 * uniform(ids).to(device)
    options["penalty"] = SafetyPenalty(**penalty_options)
    options = {
        name: value.to(device) if isinstance(value, Tensor) and value.dim() else value
        for name, value in options.items()
    }
    case = Case(
        leaves,
        target.to(device),
        None if ids is None else safety_ids.to(device),
        None,
        options,
        upstream=float(0.5 + uniform(1)),
    )
    if ids is None:
        return case
    z_s = cap(case.in_dtype(torch.float64).raw_logits(), options)[:, case.ids]
    z_s = z_s[0] if ref == "shared" and rows else z_s.sum(0) if ref == "shared" else z_s
    reference = z_s + DRIFT * normal(*z_s.shape).to(device)
    return case.changed(ref=reference.to(ref_dtype))


def cap(raw: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Write scale and cap out once more, apart from the package."""
    z = raw * options["logit_scale"]
    softcap = options["softcap"]
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Yield few combinations in which every allowed pair of two factors' levels occurs.

    Greedy, and the same in every process: the tests' names are made of it.
    """
    draw = random.Random(0)

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(row.items(), 2))

    todo: set[tuple[Any, ...]] = set()
    for (name_a, levels_a), (name_b, levels_b) in itertools.combinations(factors.items(), 2):
        todo |= {((name_a, a), (name_b, b)) for a in levels_a for b in levels_b}
    while todo:
        pair = draw.choice(sorted(todo, key=repr))
        rows = [{name: draw.choice(levels) for name, levels in factors.items()} for _ in range(40)]
        rows = [row for row in (row | dict(pair) for row in rows) if allowed(row)]
        if not rows:  # the pair itself is not allowed
            todo.remove(pair)
            continue
        best = max(rows, key=lambda row: len(pairs(row) & todo))
        todo -= pairs(best)
        yield best
