"""What runs on each rank of test_deepspeed.py: a step under DeepSpeed, and the same alone."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import ANCHORS, PENALTY, ROWS, TOKENS, base_model, compare, count, students
from distributed_cases import gradients as plain_gradients
from tiny_models import batch_of
from torch import Tensor, nn

from str_kernels import SafetyPenalty, attach
from str_kernels.op.contracts import PenaltyKind

BUSY = {"anchors": True, "micro_steps": 2}
ALONE = {**BUSY, "positions": "none", "kind": "coarse_kl"}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
# Every weight is put away between its uses, however small and however soon the next one.
PUT_AWAY = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
# What test_deepspeed.py runs: function, stage, training, options.
CALLS: dict[str, tuple[Any, ...]] = {
    "ZeRO-1 lora": ("train", 1, "lora", BUSY),
    "ZeRO-2 lora": ("train", 2, "lora", BUSY),
    "ZeRO-2 lora, anchors alone": ("train", 2, "lora", ALONE),
    "ZeRO-3 full, anchors alone": ("train", 3, "full", ALONE),
    "ZeRO-2 full": ("train", 2, "full", {}),
    "ZeRO-3 lora": ("train", 3, "lora", BUSY),
    "ZeRO-3 full": ("train", 3, "full", BUSY),
    "ZeRO-3 lora, attached before": ("train", 3, "lora", {**BUSY, **HEAD, "before": True}),
    "ZeRO-3 full, attached before": ("train", 3, "full", {**BUSY, "before": True}),
    "ZeRO-3 full, tied": ("train", 3, "full", {"model": "llama-tied"}),
    "ZeRO-3 lora, on the head too": ("train", 3, "lora", HEAD),
    "ZeRO-3 lora, logits": ("train", 3, "lora", {"path": "logits"}),
    "ZeRO-3 full, logprob": ("train", 3, "full", {"kind": "logprob"}),
}


def batches(seed: int) -> list[dict[str, Tensor]]:
    return [batch_of(seed + step, rows=ROWS) for step in range(3)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose steps are as exact as the gradients."""
    return torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)


def engine_of(model: nn.Module, stage: int, micro_steps: int = 1, **more: Any) -> Any:
    """Give a model to DeepSpeed."""
    import deepspeed

    optimizer = sgd(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": {"stage": stage, **PUT_AWAY},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 by default
        **more,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=optimizer.param_groups[0]["params"],
        optimizer=optimizer,
        config=config,
        dist_init_required=False,
    )
    return engine


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return whole gradients, averaged over the ranks."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = safe_get_full_grad(parameter)
            if grad is None:
                raise AssertionError(f"no gradient for {name}")
            found[name] = grad.detach().clone()
    return found


def train(
    stage: int,
    training: str,
    seed: int,
    anchors: bool = False,
    micro_steps: int = 1,
    path: str = "linear",
    model: str = "llama",
    kind: PenaltyKind = "mse",
    before: bool = False,
    positions: Any = "response",
    **lora: Any,
) -> dict[str, float]:
    """Train three steps on this rank's rows; return the errors of losses and gradients."""
    attaching: dict[str, Any] = {
        "penalty": SafetyPenalty(PENALTY.weight, kind),
        "path": path,
        "anchors": ANCHORS if anchors else None,
    }
    losses, grads = [], []

    student, options = students(model, training, seed, **lora)
    optimizer = sgd(student)
    with attach(student.train(), TOKENS, **attaching, **options, positions=positions):
        for batch in batches(seed):
            loss = student(**batch, num_items_in_batch=count(batch)).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append(plain_gradients(student))
            optimizer.step()
            optimizer.zero_grad()

    student, options = students(model, training, seed, **lora)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    errors = {"loss": 0.0, "gradients": 0.0}
    engine = None if before else engine_of(student.train(), stage, micro_steps)
    with attach(student, TOKENS, **attaching, **options, positions=positions):
        if engine is None:
            engine = engine_of(student.train(), stage, micro_steps)
        for batch, loss, grad in zip(batches(seed), losses, grads, strict=True):
            items = torch.tensor(count(batch))
            mine = {name: x[rank::ranks] for name, x in batch.items()}
            total = torch.zeros(())
            for micro in range(micro_steps):
                rows = {name: x[micro::micro_steps] for name, x in mine.items()}
                part = engine(**rows, num_items_in_batch=items).loss
                engine.backward(part * ranks * micro_steps)  # it averages over both
                total += part.detach()
                if micro == micro_steps - 1:
                    error = compare(gradients(student), grad)
                engine.step()
            dist.all_reduce(total)
            errors["loss"] = max(errors["loss"], abs(float(total - loss)))
            errors["gradients"] = max(errors["gradients"], error)
    return errors


def turns_in_bfloat16(seed: int, stage: int) -> list[int]:
    """Return the anchors' steps in four steps of an optimizer with copies of the weights."""
    student, options = students("llama", "lora", seed)
    student = student.train().bfloat16()
    engine = engine_of(student, stage, bf16={"enabled": True})
    found = []
    with attach(student, TOKENS, anchors=ANCHORS, **options, positions="response") as handle:
        for _ in range(4):
            engine.backward(engine(**batch_of(seed)).loss)
            found.append(handle.step)
            engine.step()
    return found


def refusals(seed: int) -> dict[str, str]:
    """Return what each setup that is refused says."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    plain = base_model("llama", seed)
    put_away = base_model("llama", seed)
    deepspeed.zero.Init(module=put_away, config_dict_or_path=config)
    found = {}
    for what, call in {
        "attached before initialize": lambda: attach(
            put_away, TOKENS, ref_model=plain, positions="response"
        ),
        "a ref_model that is put away": lambda: attach(
            plain, TOKENS, ref_model=put_away, positions="response"
        ),
    }.items():
        try:
            call()
            found[what] = "nothing"
        except ValueError as error:
            found[what] = str(error)
    return found


def run_all(calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Run every call; an error is returned by its text."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the group is there already
    found: dict[str, Any] = {}
    for name, (function, *arguments, options) in calls.items():
        try:
            found[name] = globals()[function](*arguments, **options)
        except Exception as error:
            import traceback

            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    return found
