"""What runs on each rank of test_distributed_training.py: SafetyTrainer under DDP."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import fresh_lora, tiny_model
from tiny_rows import Padding, Rows
from transformers import TrainerCallback, TrainingArguments

from str_kernels import SafetyPenalty, SafetyTokens
from str_kernels.integrations.anchors.prompts import AnchorPrompts, AnchorRow
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer

GLOBAL_BATCH = 8


class Killed(TrainerCallback):
    """Ends the last rank as an out-of-memory killer would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def as_if_on_gpus() -> None:
    """Have accelerate take gloo ranks on a CPU for ranks with GPUs.

    It has DeepSpeed and FSDP on no CPU, though nothing in them needs more.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def set_device(state: Any) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


def spread_by_its_plan(seed: int, folder: str) -> Any:
    """Return the same model as without, tensor parallel as transformers plans it."""
    from distributed_cases import copy_adapters
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    base = tiny_model("llama", seed)
    if dist.get_rank() == 0:
        base.save_pretrained(f"{folder}/model")
    whole = fresh_lora(base, init_lora_weights="gaussian")  # before anything else is drawn
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", distributed_config=config)
    model = fresh_lora(model)
    copy_adapters(whole, model)
    return model


def train(
    seed: int,
    folder: str,
    steps: int,
    resume: str | None = None,
    kill: bool = False,
    reentrant: bool = False,
    tensor_parallel: bool = False,
    **arguments_of_trainer: Any,
) -> dict[str, Any]:
    """Train on all ranks, as a launcher would have it; return the log and the adapter's weights."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the group is there already
    if arguments_of_trainer or tensor_parallel:
        as_if_on_gpus()
    model: Any
    if tensor_parallel:
        model = spread_by_its_plan(seed, folder)
        ranks = 1  # of those that have rows of their own
    else:
        model = fresh_lora(tiny_model("llama", seed), init_lora_weights="gaussian")
    if reentrant:
        model.enable_input_require_grads()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=GLOBAL_BATCH // ranks,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        save_only_model=tensor_parallel,  # as transformers asks for
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=11,
        use_cpu=not (arguments_of_trainer or tensor_parallel),
        ddp_backend="gloo",
        gradient_checkpointing=reentrant,
        gradient_checkpointing_kwargs={"use_reentrant": True} if reentrant else None,
        ddp_find_unused_parameters=False,
        **arguments_of_trainer,
    )
    anchors = AnchorPrompts([AnchorRow((5, 9, 2)), AnchorRow((7, 8)), AnchorRow((4, 30, 3))])
    trainer = SafetyTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(seed, 64),
        data_collator=lambda rows: Padding().pad(rows),
        safety_tokens=SafetyTokens(ids=[5, 9, 77]),
        penalty=SafetyPenalty(0.3),
        anchors=anchors,
        callbacks=[Killed()] if kill else [],
        positions="response",
    )
    if ranks > 1:
        assert trainer.args.parallel_mode.value == "distributed"
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "log": log,
        "weights": {name: torch.clone(x) for name, x in weights.items()},
        "spread": any(hasattr(parameter, "placements") for parameter in model.parameters()),
    }


def train_with(seed: int, folder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train four steps with more arguments of the trainer."""
    return train(seed, folder, 4, **arguments)
