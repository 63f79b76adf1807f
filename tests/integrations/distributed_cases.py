"""What runs on each rank of test_distributed.py: a model spread in some way, and the same alone."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import CONFIGS, VOCAB, batch_of, tiny_model, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from str_kernels import SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.anchors.prompts import AnchorPrompts, AnchorRow

TOKENS = SafetyTokens(ids=[3, 40, 66, 130])  # on several ranks
PENALTY = SafetyPenalty(weight=0.3)
ROWS = 8
ANCHORS = AnchorPrompts(
    [AnchorRow((5, 9, 2)), AnchorRow((7, 7, 8, 4, 30))], per_step=2, penalty_weight=0.5
)


def mesh_of(*sizes: int) -> Any:
    names = ("dp", "tp")[: len(sizes)] if len(sizes) > 1 else ("dp",)
    return dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def base_model(name: str, seed: int) -> Any:
    model = tiny_model(name, seed)
    model.config.use_cache = False
    return model


def students(name: str, training: str, seed: int, **lora: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model and what attach needs beside it; options are LoraConfig's."""
    if training == "lora":
        return with_lora(base_model(name, seed), seed, **lora), {}
    return base_model(name, seed), {"ref_model": base_model(name, seed + 7)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return whole gradients by the names that a plain model has for them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            if grad is None:
                raise AssertionError(f"no gradient for {name}")
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.replace("module.", "").replace("_checkpoint_wrapped_", "")] = whole.detach()
    return found


def compare(mine: dict[str, Tensor], alone: dict[str, Tensor]) -> float:
    """Return the largest error of a gradient, relative to its largest entry."""
    assert set(mine) == set(alone), set(mine) ^ set(alone)
    return max(
        float((mine[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6))
        for name, grad in alone.items()
    )


def count(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def alone(
    name: str, training: str, seed: int, anchors: bool, path: str, positions: Any = "response"
) -> tuple[float, dict[str, Tensor]]:
    """Train a step on the whole batch in this process."""
    model, options = students(name, training, seed)
    model.train()
    batch = batch_of(seed, rows=ROWS)
    options["anchors"] = ANCHORS if anchors else None
    with attach(model, TOKENS, penalty=PENALTY, path=path, **options, positions=positions):
        loss = model(**batch, num_items_in_batch=count(batch)).loss
        loss.backward()
    return float(loss.detach()), gradients(model)


def step(
    model: nn.Module, seed: int, part: int, parts: int, micro_steps: int, average: int
) -> Tensor:
    """Train a step on this rank's rows, in micro-steps; return the loss summed over the parts."""
    batch = batch_of(seed, rows=ROWS)
    items = count(batch)
    mine = {name: x[part::parts] for name, x in batch.items()}
    total = torch.zeros(())
    for micro in range(micro_steps):
        last = micro == micro_steps - 1
        later: Any = contextlib.nullcontext()
        if hasattr(model, "no_sync") and not last:
            later = model.no_sync()
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        with later:
            rows = {name: x[micro::micro_steps] for name, x in mine.items()}
            loss = model(**rows, num_items_in_batch=torch.tensor(items)).loss
            (loss * average).backward()
        total += loss.detach()
    return total


def data_parallel(
    how: str,
    name: str,
    training: str,
    seed: int,
    anchors: bool = False,
    micro_steps: int = 1,
    path: str = "linear",
    positions: Any = "response",
) -> dict[str, float]:
    """Train a step under DDP or FSDP2; return the errors."""
    loss, grads = alone(name, training, seed, anchors, path, positions)
    model, options = students(name, training, seed)
    model.train()
    options["anchors"] = ANCHORS if anchors else None
    ranks = dist.get_world_size()
    with attach(model, TOKENS, penalty=PENALTY, path=path, **options, positions=positions):
        spread = SPREAD[how](model)
        total = step(spread, seed, dist.get_rank(), ranks, micro_steps, ranks)
        dist.all_reduce(total)
        return {"loss": abs(float(total) - loss), "gradients": compare(gradients(spread), grads)}


def inner_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model: nn.Module, *, head: bool = False, mesh: Any = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh
    inner = inner_of(model)
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(inner.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _fsdp_tied_group(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh, inner = mesh_of(dist.get_world_size()), inner_of(model)
    fully_shard([inner.model.embed_tokens, inner.lm_head], mesh=mesh)
    return _fsdp(model, mesh=mesh)


SPREAD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": _ddp,
    "fsdp": _fsdp,
    "fsdp, head its own unit": functools.partial(_fsdp, head=True),
    "fsdp, head and embedding one unit": _fsdp_tied_group,
}


def refusals(seed: int) -> dict[str, str]:
    """Return what each setup that is refused says."""
    found = {}
    sharded = _fsdp(base_model("llama", seed))
    wrapped = _ddp(base_model("llama", seed))
    plain = base_model("llama", seed)
    for what, call in {
        "attached after fully_shard": lambda: attach(
            sharded, TOKENS, ref_model=plain, positions="response"
        ),
        "a ref_model after fully_shard": lambda: attach(
            plain, TOKENS, ref_model=sharded, positions="response"
        ),
        "attached after DDP": lambda: attach(
            wrapped, TOKENS, ref_model=plain, positions="response"
        ),
    }.items():
        try:
            call()
            found[what] = "nothing"
        except (TypeError, ValueError) as error:
            found[what] = str(error)
    return {**found, "spread since": spread_since(seed)}


def spread_since(seed: int) -> str:
    """Ask for the operands of a head that somebody spread after it was looked at."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from str_kernels.integrations.models.heads import head_at

    head = head_at(base_model("llama", seed).lm_head)
    linear: Any = head.module
    mesh = mesh_of(dist.get_world_size())
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    try:
        head.operands(torch.zeros(1, 32))
    except ValueError as error:
        return str(error)
    return "nothing"


@contextlib.contextmanager
def tp_config() -> Iterator[None]:
    """Let the tiny llama have as many key heads as there are ranks."""
    old = CONFIGS["llama"]

    def config() -> Any:
        made = old()
        made.num_key_value_heads = 4
        return made

    CONFIGS["llama"] = config
    try:
        yield
    finally:
        CONFIGS["llama"] = old


@torch.no_grad()
def copy_adapters(source: nn.Module, model: nn.Module) -> None:
    """Give spread adapters, each rank of which drew its own part, the numbers of whole ones."""
    from torch.distributed.tensor import distribute_tensor

    values = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value: Tensor = values[name]
            if hasattr(parameter, "placements"):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def tensor_parallel(
    training: str,
    seed: int,
    folder: Path,
    anchors: bool = False,
    path: str = "linear",
    positions: Any = "response",
) -> dict[str, Any]:
    """Train a step of a model that transformers spread by its tp_plan."""
    from transformers.distributed import DistributedConfig

    ranks = dist.get_world_size()
    with tp_config():
        loss, grads = alone("llama", training, seed, anchors, path, positions)
        save = f"{folder}/{training}{seed}"
        if dist.get_rank() == 0:
            base_model("llama", seed).save_pretrained(save)
        dist.barrier()
        config = DistributedConfig(tp_size=ranks, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(save, distributed_config=config)
        assert hasattr(model.lm_head.weight, "placements")
        options: dict[str, Any] = {}
        if training == "lora":
            model = with_lora(model, seed)
            copy_adapters(with_lora(base_model("llama", seed), seed), model)
        else:
            options["ref_model"] = base_model("llama", seed + 7)
        model.train()
        options["anchors"] = ANCHORS if anchors else None
        with attach(model, TOKENS, penalty=PENALTY, path=path, **options, positions=positions):
            batch = batch_of(seed, rows=ROWS)
            mine = model(**batch, num_items_in_batch=count(batch)).loss
            mine.backward()
        before = float("nan")
        if training == "lora":  # one that has not moved
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
            with attach(
                model, TOKENS, penalty=PENALTY, path=path, **options, positions=positions
            ) as handle:
                model(**batch)
                before = float(handle.last.penalty)
        losses = [torch.zeros(()) for _ in range(ranks)]
        dist.all_gather(losses, mine.detach())
        return {
            "loss": abs(float(mine.detach()) - loss),
            "gradients": compare(gradients(model), grads),
            "equal": len({float(x) for x in losses}) == 1,
            "penalty at first": before,
        }


def lora_on_a_spread_head(seed: int, folder: Path) -> str:
    """Ask for a LoRA on a head that transformers spread by its tp_plan."""
    from transformers.distributed import DistributedConfig

    save = f"{folder}/head{seed}"
    with tp_config():
        if dist.get_rank() == 0:
            base_model("llama", seed).save_pretrained(save)
        dist.barrier()
        config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(save, distributed_config=config)
    try:
        attach(with_lora(model, seed, target_modules=["lm_head"]), TOKENS, positions="response")
    except ValueError as error:
        return str(error)
    return "nothing"


def fsdp_and_tensor_parallel(training: str, seed: int) -> dict[str, float]:
    """Train a step on a mesh of two dimensions: rows over one, every weight over both."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = mesh_of(2, dist.get_world_size() // 2)
    with tp_config():
        loss, grads = alone("llama", training, seed, False, "linear")
        whole, options = students("llama", training, seed)
        model = base_model("llama", seed)
    apply_tensor_parallelism(model, mesh["tp"], model._expand_parallel_plan(dict(model.tp_plan)))
    if training == "lora":  # PEFT spreads its own by what the model says of itself
        model._device_mesh = mesh
        model.config.distributed_config = DistributedConfig(tp_size=2, fsdp_size=2)
        model = with_lora(model, seed)
        copy_adapters(whole, model)
    model.train()
    with attach(model, TOKENS, penalty=PENALTY, **options, positions="response"):
        spread = _fsdp(model, mesh=mesh["dp"])
        dp = mesh.get_local_rank("dp")
        total = step(spread, seed, dp, 2, 1, 2)
        dist.all_reduce(total, group=mesh["dp"].get_group())
        return {"loss": abs(float(total) - loss), "gradients": compare(gradients(spread), grads)}


def split_sequence(seed: int) -> dict[str, float]:
    """Give each rank a document of one packed row, with targets that were shifted before."""
    ranks = dist.get_world_size()
    length = 6
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (1, ranks * length), generator=generator)
    position_ids = torch.arange(length).repeat(ranks).unsqueeze(0)
    labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, ::4] = -100
    items = int((labels != -100).sum())

    def run(columns: slice) -> tuple[Tensor, dict[str, Tensor]]:
        model, options = students("llama", "full", seed)
        model.train()
        with attach(model, TOKENS, penalty=PENALTY, **options, positions="response"):
            loss = model(
                input_ids=ids[:, columns],
                position_ids=position_ids[:, columns],
                shift_labels=labels[:, columns],
                num_items_in_batch=items,
            ).loss
            loss.backward()
        return loss.detach(), gradients(model)

    loss, grads = run(slice(None))
    start = dist.get_rank() * length
    mine, parts = run(slice(start, start + length))
    dist.all_reduce(mine)
    for grad in parts.values():
        dist.all_reduce(grad)
    return {"loss": abs(float(mine) - float(loss)), "gradients": compare(parts, grads)}


def run_all(calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Run every call; an error is returned by its text, and must then be one on every rank."""
    found: dict[str, Any] = {}
    for name, (function, *arguments) in calls.items():
        function = copy.copy(globals()[function])
        *positional, options = arguments
        try:
            found[name] = function(*positional, **options)
        except Exception as error:
            import traceback

            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    return found
