"""Inputs for both functions: random, with the awkward rows always among them."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from str_kernels import (
    SafetyLoss,
    SafetyPenalty,
    safety_cross_entropy,
    safety_linear_cross_entropy,
)
from str_kernels.op.contracts import PenaltyKind

SEED_VARIABLE = "STR_TEST_SEED"
PENALTY_WEIGHT = 0.3
DRIFT = 0.5  # standard deviation of reference minus student, logits
SOFTCAP = 5.0  # logits of deviation 1 cap: both branches of the kernel's tanh are taken
SCALE = 1.3
TEMPERATURE = 1.7  # not 1, where T and T^2 could be mixed up
DELTA = 0.4  # below DRIFT: on both sides of it there are ids
ID_WEIGHTS = 3  # id weights are drawn from [0, 2), one in this many is exactly 0
KINDS: tuple[str, ...] = get_args(PenaltyKind)
ON_LOG_PROBS = ("logprob", "coarse_kl")
PATHS = ["logits", "linear", "linear+bias", "linear+lora"]
DTYPES = {
    **{"fp32": torch.float32, "bf16": torch.bfloat16},
    **{"fp16": torch.float16, "fp64": torch.float64},
}
ROW_WEIGHTS = {"safety_rows": "weights", "ce_rows": "weights"}
WEIGHTS: dict[str, Any] = {**ROW_WEIGHTS, "id_weights": True}
EXTRAS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss_weight": 0.02, "metrics": True}
# Leaves of which row n belongs to row n of the batch.
OF_ROWS = ("logits", "hidden", "low_rank_t")


@dataclass(frozen=True)
class Result:
    terms: SafetyLoss
    grads: dict[str, Tensor | None]


def assert_same(got: Result, wanted: Result) -> None:
    """Compare terms and gradients in every bit; a gradient of wider dtype with the rounded one."""
    for mine, term in zip(present(got.terms), present(wanted.terms), strict=True):
        assert torch.equal(mine, term)
    for name, grad in wanted.grads.items():
        mine_grad = got.grads[name]
        assert torch.equal(mine_grad, grad.to(mine_grad.dtype)), name


def detached(terms: SafetyLoss) -> SafetyLoss:
    return SafetyLoss(*(None if x is None else x.detach() for x in terms))


def present(terms: SafetyLoss) -> list[Tensor]:
    """Return the terms that were asked for: without `metrics` the last two are None."""
    return [x for x in terms if x is not None]


@dataclass(frozen=True)
class Case:
    """One call of one of the two functions, and the gradient that reaches its loss."""

    # {"logits"}, or {"hidden", "linear_weight"} and maybe "linear_bias", or "low_rank_t" (N, r) and
    # "low_rank_b" (V, r)
    leaves: dict[str, Tensor]
    target: Tensor  # (N,)
    ids: Tensor | None  # (K,)
    ref: Tensor | None  # (N, K) or (K,)
    options: dict[str, Any]  # keyword arguments of the function
    upstream: float
    frozen: frozenset[str] = frozenset()  # leaves that take no gradient
    row_upstream: Tensor | None = None  # (N,) float32, a factor on it with reduction "none"

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

    def from_logits(self, logits: Tensor) -> Case:
        """Return the case that has these logits, without what only the linear path knows."""
        options = {k: v for k, v in self.options.items() if k not in ("chunk_bytes", "pack_rows")}
        return replace(self, leaves={"logits": logits}, options=options)

    def rows(self, part: slice | Tensor) -> Case:
        """Return the case of some rows; counts stay, since they may be those of all rows."""
        options = dict(self.options)
        for name in ("safety_row_weight", "ce_row_weight"):
            if options.get(name) is not None:
                options[name] = options[name][part]
        ref = self.ref[part] if self.ref is not None and self.ref.dim() == 2 else self.ref
        leaves = {name: x[part] if name in OF_ROWS else x for name, x in self.leaves.items()}
        upstream = None if self.row_upstream is None else self.row_upstream[part]
        return replace(
            self,
            leaves=leaves,
            target=self.target[part],
            ref=ref,
            options=options,
            row_upstream=upstream,
        )

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
        if backend == "eager":  # has no chunks, and as the truth has larger elements
            options.pop("inplace", None)
            options.pop("chunk_bytes", None)
        if self.linear:
            return safety_linear_cross_entropy(
                leaves["hidden"],
                leaves["linear_weight"],
                self.target,
                self.ids,
                self.ref,
                linear_bias=leaves.get("linear_bias"),
                **self.low_rank_of(leaves),
                **options,
            )
        return safety_cross_entropy(leaves["logits"], self.target, self.ids, self.ref, **options)

    def as_function(self, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Return the loss as a function of its leaves, and the leaves, as gradcheck takes them."""
        names = list(self.leaves)

        def loss(*leaves: Tensor) -> Tensor:
            return self.loss(dict(zip(names, leaves, strict=True)), backend).loss

        return loss, tuple(self.live_leaves().values())

    @staticmethod
    def low_rank_of(leaves: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the keyword argument `low_rank`, where there is one."""
        if "low_rank_t" not in leaves:
            return {}
        return {"low_rank": (leaves["low_rank_t"], leaves["low_rank_b"])}

    def cotangent(self, loss: Tensor) -> Tensor:
        """Return what reaches the loss: one number, or with reduction "none" one per row."""
        if self.row_upstream is None:
            return torch.full_like(loss, self.upstream)
        return self.row_upstream.to(loss.dtype) * self.upstream

    def run(self, backend: str, autocast: torch.dtype | None = None) -> Result:
        """Run forward, under autocast if asked to, and backward, outside it as torch advises."""
        leaves = self.live_leaves()
        kind = self.target.device.type
        with torch.autocast(kind, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            terms = self.loss(leaves, backend)
        terms.loss.backward(self.cotangent(terms.loss))
        return Result(detached(terms), {name: x.grad for name, x in leaves.items()})

    def raw_logits(self) -> Tensor:  # (N, V)
        if not self.linear:
            return self.leaves["logits"]
        leaves = self.leaves
        raw = torch.nn.functional.linear(
            leaves["hidden"], leaves["linear_weight"], leaves.get("linear_bias")
        )
        if "low_rank_t" in leaves:  # added to the head's product, which was rounded to its dtype
            raw = torch.addmm(raw, leaves["low_rank_t"], leaves["low_rank_b"].t())
        return raw


def generator_of(seed: str, test: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {test}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def make_case(
    rng: torch.Generator,
    device: torch.device,
    *,
    path: str = "logits",  # one of PATHS
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
    kind: str = "mse",  # one of KINDS
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    metrics: bool = False,
    rank: int = 3,  # of "linear+lora"
    pack_rows: bool | None = None,
    counts: str = "default",  # "numbers", "tensors"
    reduction: str = "mean",  # "sum", "none"
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
    options["label_smoothing"] = label_smoothing
    options["z_loss_weight"] = z_loss_weight
    options["metrics"] = metrics

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
        if path == "linear+lora":
            leaves["low_rank_t"] = normal(rows, rank)
            leaves["low_rank_b"] = deviation / (2 * max(rank, 1) ** 0.5) * normal(vocab, rank)
        options["pack_rows"] = pack_rows
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
    penalty_options: dict[str, Any] = {"weight": PENALTY_WEIGHT, "kind": kind}
    penalty_options.update(temperature=TEMPERATURE, delta=DELTA)
    if penalty_weight == "tensor":
        penalty_options["weight"] = torch.tensor(PENALTY_WEIGHT)
    if id_weights and ids:
        a = 2 * uniform(ids) * (torch.arange(ids) % ID_WEIGHTS != 1)
        penalty_options["id_weights"] = a.to(device)
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
    if reduction == "none":
        row_upstream = normal(rows).float()
        row_upstream[3:4] = 0.0  # a row that has a loss, which nobody asks for
        case = case.changed(row_upstream=row_upstream.to(device))
    if ids is None:
        return case
    z = cap(case.in_dtype(torch.float64).raw_logits(), options)
    z_s = (z.log_softmax(1) if kind in ON_LOG_PROBS else z)[:, case.ids]
    z_s = z_s[0] if ref == "shared" and rows else z_s.sum(0) if ref == "shared" else z_s
    reference = z_s + DRIFT * normal(*z_s.shape).to(device)
    return case.changed(ref=reference.to(ref_dtype))


def cap(raw: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Write scale and cap out once more, apart from the package."""
    z = raw * options["logit_scale"]
    softcap = options["softcap"]
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def with_masked_vocabulary(
    case: Case, rng: torch.Generator, share: float, block: int = 4096
) -> tuple[Case, Tensor]:
    """Mask a share of the logits by -inf, and of two rows the whole first block of a kernel.

    Returns the case, and where it is masked: at no safety id and at no target.
    """
    logits = case.leaves["logits"].clone()
    masked = (torch.rand(logits.shape, generator=rng) < share).to(logits.device)
    masked[:2, :block] = True
    masked[:, case.ids] = False
    masked[torch.arange(len(logits)), case.target.clamp(min=0)] = False
    logits[masked] = -torch.inf
    return case.with_leaves(logits=logits), masked


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
