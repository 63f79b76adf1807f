"""All ways to compute the loss: by hand, torch, TRL, Liger, CCE and ours.

A provider computes cross-entropy plus penalty from `Inputs`. For libraries without such a penalty
it is computed with `project`, as their users would add it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels import SafetyPenalty, project, safety_linear_cross_entropy
from str_kernels.op.backends import missing_for

from ..inputs import WEIGHT, Inputs, full_logits

ALL_OPTIONS = ", all options"
_CAP_OF_ALL_OPTIONS = 30.0


class Provider(NamedTuple):
    """One way to compute the loss."""

    name: str
    loss: Callable[[Inputs], Tensor]
    package: str = "torch"  # whose version is recorded
    needs: tuple[str, ...] = ()  # see `_missing_part`
    caps: bool = True  # can do a softcap and a logit scale
    caps_without_scale: bool = False  # where not `caps`: can do a softcap, but no scale
    bytes_per_logit: int = 0  # that it holds at its peak for (N, V) in bfloat16, about
    truth: Callable[[Inputs], Tensor] | None = None  # None: the loss by hand, with the penalty
    warm_up_whole: bool = False  # compiles for the shape that it sees


def by_hand(x: Inputs, weight: float = WEIGHT) -> Tensor:
    """Compute the loss in the obvious way, from all logits at once."""
    logits = full_logits(x.hidden, x.head, x.shape)
    return F.cross_entropy(logits, x.target) + weight * F.mse_loss(logits[:, x.ids], x.ref)


def two_full_logits(x: Inputs) -> Tensor:
    """Compute the loss from all logits of both models, a literal reading of the method."""
    with torch.no_grad():
        ref = full_logits(x.ref_hidden, x.head, x.shape)
    logits = full_logits(x.hidden, x.head, x.shape)
    ce = F.cross_entropy(logits, x.target)
    return ce + WEIGHT * F.mse_loss(logits[:, x.ids], ref[:, x.ids])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # for the shape it meets, as a trainer with padded batches would have it
    return torch.compile(by_hand, dynamic=False)


def _compiled_by_hand(x: Inputs) -> Tensor:
    return _compiled()(x)


def _separate_penalty(x: Inputs) -> Tensor:
    scale, cap = x.shape.logit_scale, x.shape.softcap
    safety_logits = project(x.hidden, x.head, x.ids, logit_scale=scale, softcap=cap)
    return WEIGHT * F.mse_loss(safety_logits, x.ref)


def _torch_linear(x: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without options it computes all logits
    return F.linear_cross_entropy(x.hidden, x.head, x.target, options=options) + (
        _separate_penalty(x)
    )


def _trl(x: Inputs) -> Tensor:
    """Call TRL's kernel as its SFTTrainer does: `add_fused_lm_head` and `compute_loss`."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size

    kept = x.target != -100
    hidden, target = (x.hidden[kept], x.target[kept]) if x.hidden.is_cuda else (x.hidden, x.target)
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden,
        x.head,
        None,
        target,
        1.0,
        chunk_size,
        x.shape.softcap,
        x.shape.logit_scale,
        ("log_probs", "entropy", "is_top1"),
    )
    return -log_probs.sum() / kept.sum().clamp(min=1) + _separate_penalty(x)


def _liger(x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    ce = liger_fused_linear_cross_entropy(x.hidden, x.head, x.target, softcap=x.shape.softcap)
    return ce + _separate_penalty(x)


def _cce(x: Inputs, impl: str = "cce") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    ce = linear_cross_entropy(x.hidden, x.head, x.target, softcap=x.shape.softcap, impl=impl)
    return ce + _separate_penalty(x)


def _ours(x: Inputs, backend: str, with_penalty: bool = True) -> Tensor:
    given = (x.ids, x.ref) if with_penalty else ()
    return safety_linear_cross_entropy(
        x.hidden,
        x.head,
        x.target,
        *given,
        penalty=SafetyPenalty(WEIGHT),
        logit_scale=x.shape.logit_scale,
        softcap=x.shape.softcap,
        backend=backend,
    ).loss


def _ours_all_options(x: Inputs, backend: str) -> Tensor:
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss_weight": 1e-4, "metrics": True}
    return safety_linear_cross_entropy(
        x.hidden,
        x.head,
        x.target,
        x.ids,
        x.ref_log_probs,
        penalty=SafetyPenalty(WEIGHT, kind="logprob"),
        logit_scale=x.shape.logit_scale,
        softcap=x.shape.softcap or _CAP_OF_ALL_OPTIONS,
        backend=backend,
        **options,
    ).loss


def bare_products(x: Inputs) -> None:
    """Compute only the matrix products of every exact method: logits, then their gradients."""
    hidden, head = x.hidden.detach(), x.head.detach()
    logits = hidden @ head.t()
    logits @ head
    if x.head.requires_grad:
        logits.t() @ hidden


EAGER = Provider("eager", by_hand, bytes_per_logit=16)
_WITHOUT_PENALTY = functools.partial(by_hand, weight=0.0)
_EXACT_ALL_OPTIONS = functools.partial(_ours_all_options, backend="eager")
_OURS_NEED: dict[str, tuple[str, ...]] = {
    "torch": (),
    "compiled": ("backend compiled",),
    "triton": ("gpu", "backend triton"),
}


def providers(*, all_options: bool = False) -> list[Provider]:
    """Return every provider, even if it cannot run here; `all_options` adds ours with all on."""
    found = [
        EAGER,
        Provider(
            "torch.compile",
            _compiled_by_hand,
            needs=("backend compiled",),  # what it takes is the same
            bytes_per_logit=6,
            warm_up_whole=True,
        ),
        Provider("two full logits", two_full_logits, bytes_per_logit=16),
        Provider(
            "F.linear_cross_entropy", _torch_linear, needs=("F.linear_cross_entropy",), caps=False
        ),
        Provider("TRL", _trl, "trl", ("trl",)),
        Provider(
            "Liger",
            _liger,
            "liger-kernel",
            ("gpu", "liger_kernel"),
            caps=False,
            caps_without_scale=True,
        ),
        Provider(
            "CCE",
            _cce,
            "cut-cross-entropy",
            ("gpu", "cut_cross_entropy"),
            caps=False,
            caps_without_scale=True,
        ),
        Provider(  # all logits, by torch.compile: what CCE offers where Triton does not run
            "CCE (torch_compile)",
            functools.partial(_cce, impl="torch_compile"),
            "cut-cross-entropy",
            ("cut_cross_entropy", "backend compiled"),
            caps=False,
            caps_without_scale=True,
            bytes_per_logit=6,
            warm_up_whole=True,
        ),
    ]
    for backend, needs in _OURS_NEED.items():
        common: dict[str, Any] = {
            "package": "str-kernels",
            "needs": needs,
            "warm_up_whole": backend == "compiled",
        }
        name = f"ours ({backend})"
        ours = functools.partial(_ours, backend=backend)
        plain = functools.partial(_ours, backend=backend, with_penalty=False)
        found.append(Provider(name, ours, **common))
        found.append(Provider(f"{name}, no penalty", plain, truth=_WITHOUT_PENALTY, **common))
        if all_options:
            every = functools.partial(_ours_all_options, backend=backend)
            found.append(Provider(name + ALL_OPTIONS, every, truth=_EXACT_ALL_OPTIONS, **common))
    return found


def missing(provider: Provider, x: Inputs) -> str | None:
    """Return why the provider cannot do this here, or None."""
    for part in provider.needs:
        if why := _missing_part(part, x.hidden):
            return why
    if x.shape.softcap and not (provider.caps or provider.caps_without_scale):
        return "no softcap"
    if x.shape.logit_scale != 1.0 and not provider.caps:
        return "no logit scale"
    return None


def version_of(package: str) -> str:
    """Return the installed version of a package, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _missing_part(part: str, like: Tensor) -> str | None:
    """Return why "gpu", "backend X", "F.X" or a package to import is missing, or None."""
    if part == "gpu":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        if like.device.type == "cpu" or interpreted:
            return "needs a GPU: Triton's interpreter is not timed"
        return None
    if part.startswith("backend "):
        return missing_for(part.removeprefix("backend "), like.device, like.dtype)
    if part.startswith("F."):
        has = hasattr(F, part.removeprefix("F."))
        return None if has else f"torch {torch.__version__} has no {part}"
    return None if importlib.util.find_spec(part) else f"package {part} is not installed"
