"""docs/trainers.md: its blocks are run, and take the steps of a loop written by hand.

LLaMA-Factory 0.9.5 allows transformers up to 5.6 and trl up to 0.24, so that it cannot be installed
beside what is tested here. Its stand-ins have the names and the signatures of its train/sft and
train/tuner.py; the page says what the script did with the real one. The block for ms-swift is run
in test_swift_plugin.py.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from doc_blocks import python_blocks, run_block
from recipe_setup import (
    BOUND,
    TURNS,
    Recipe,
    assert_same_logs,
    expected_steps,
    make_optimizer,
    make_recipe,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

PAGE = "docs/trainers.md"
NAMES = (
    "windows", "plain loop", "Accelerate", "Trainer", "TRL", "ms-swift", "LLaMA-Factory",
    "Lightning",
)  # fmt: skip
BLOCKS = dict(zip(NAMES, python_blocks(PAGE), strict=True))

# TRL and Lightning warn of what a test leaves at its default; newer transformers of TRL's names
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


def run(name: str, recipe: Recipe, space: dict[str, Any]) -> list[float]:
    """Run a block; return the loss of each forward of its model that trained."""
    model = recipe.make_model()
    losses: list[float] = []

    def note(module: Any, _: Any, output: Any) -> None:
        if module.training and getattr(output, "loss", None) is not None:  # TRL's has sums
            losses.append(float(output.loss.detach()))

    model.register_forward_hook(note)
    space |= {
        "peft_model": model,
        "tokenizer": recipe.tokenizer,
        "loader": recipe.loader(),
        "accumulation": recipe.accumulation,
        "make_optimizer": make_optimizer,
        "collator": recipe.collator,
        "rows": recipe.rows,
    }
    run_block(PAGE, BLOCKS["windows"], space)
    run_block(PAGE, BLOCKS[name], space)
    return losses


def assert_same_steps(losses: list[float], recipe: Recipe) -> None:
    """Compare the micro-steps' losses, each a share of its step's, with the steps by hand."""
    n = recipe.accumulation
    steps = [sum(losses[start : start + n]) for start in range(0, len(losses), n)]
    assert steps == pytest.approx([step.loss for step in expected_steps(recipe)], rel=BOUND)


def test_windows_count_what_is_predicted() -> None:
    """No position predicts the first token of a row, labelled or not."""
    space: dict[str, Any] = {}
    run_block(PAGE, BLOCKS["windows"], space)
    rows = ([5, 6, -100], [-100, 7, 8], [5, -100, -100], [5, 6, 7])
    loader = [{"labels": torch.tensor([row])} for row in rows]
    found = [[int(b["num_items_in_batch"]) for b in w] for w in space["windows"](loader, 3)]
    assert found == [[3, 3, 3], [2]]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain loop", "Accelerate"])
def test_loops(name: str, accumulation: int, seed: int, tmp_path: Any) -> None:
    recipe = make_recipe(tmp_path, seed, accumulation)
    assert_same_steps(run(name, recipe, {}), recipe)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_lightning(accumulation: int, anchored: bool, seed: int, tmp_path: Any) -> None:
    pytest.importorskip("lightning")  # the releases of the matrix are tested without it
    recipe = make_recipe(tmp_path, seed, accumulation, anchored)
    settings = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
    }  # fmt: skip
    space = {"options": recipe.options, "settings": settings}
    assert_same_steps(run("Lightning", recipe, space), recipe)
    assert space["trainer"].global_step == -(-7 // accumulation)  # type: ignore[attr-defined]
    assert float(space["trainer"].callback_metrics["safety/anchor_penalty"]) > 0.0  # type: ignore[attr-defined]
    inner = space["peft_model"].get_base_model()  # type: ignore[attr-defined]
    assert "forward" not in vars(inner)  # the handle is removed


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_trainer(accumulation: int, seed: int, tmp_path: Any) -> None:
    recipe = make_recipe(tmp_path, seed, accumulation)
    arguments = TrainingArguments(**recipe.arguments(tmp_path), remove_unused_columns=False)
    space: dict[str, Any] = {"training_arguments": arguments}
    assert_same_steps(run("Trainer", recipe, space), recipe)
    assert_same_logs(space["trainer"], recipe)


def test_trl(seed: int, tmp_path: Any) -> None:
    pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
    from datasets import Dataset

    recipe = make_recipe(tmp_path, seed, 2)
    chats = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in TURNS
    ]
    settings = {**recipe.arguments(tmp_path), "bf16": False, "gradient_checkpointing": False}
    space: dict[str, Any] = {"chats": Dataset.from_list(chats), "settings": settings}
    assert run("TRL", recipe, space) == []
    assert_same_logs(space["trainer"], recipe)


class Workflow:
    """LLaMA-Factory's run_sft: it looks its trainer's class up when it runs."""

    def __init__(self, module: types.ModuleType, recipe: Recipe, folder: Any, dft: bool) -> None:
        self.module, self.recipe, self.folder, self.dft = module, recipe, folder, dft
        self.space: dict[str, Any] = {}

    def __call__(self, args: Any = None, callbacks: Any = None) -> None:
        self.trainer = self.module.CustomSeq2SeqTrainer(
            model=self.space["peft_model"],
            args=Seq2SeqTrainingArguments(**self.recipe.arguments(self.folder)),
            finetuning_args=types.SimpleNamespace(use_dft_loss=self.dft),
            data_collator=self.recipe.collator,
            callbacks=callbacks,
            gen_kwargs={},
            ref_model=None,
            train_dataset=self.recipe.rows,
            tokenizer=self.recipe.tokenizer,
            processor=None,
        )
        self.trainer.train()


class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    """Takes what run_sft passes; a loss of its own is set after Trainer's own __init__."""

    def __init__(
        self, finetuning_args: Any, processor: Any, model_args: Any = None, gen_kwargs: Any = None,
        ref_model: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args, self.ref_model = finetuning_args, ref_model
        if finetuning_args.use_dft_loss:
            self.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss


def llama_factory(monkeypatch: Any, recipe: Recipe, folder: Any, dft: bool = False) -> Workflow:
    workflow = types.ModuleType("llamafactory.train.sft.workflow")
    vars(workflow)["CustomSeq2SeqTrainer"] = CustomSeq2SeqTrainer
    run_exp = Workflow(workflow, recipe, folder, dft)
    for name, content in {
        "llamafactory": {},
        "llamafactory.train": {},
        "llamafactory.train.sft": {"workflow": workflow},
        "llamafactory.train.tuner": {"run_exp": run_exp},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return run_exp


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_llama_factory(accumulation: int, seed: int, tmp_path: Any, monkeypatch: Any) -> None:
    recipe = make_recipe(tmp_path, seed, accumulation)
    run_exp = llama_factory(monkeypatch, recipe, tmp_path)
    assert_same_steps(run("LLaMA-Factory", recipe, run_exp.space), recipe)
    assert isinstance(run_exp.trainer, CustomSeq2SeqTrainer)
    assert_same_logs(run_exp.trainer, recipe)


def test_llama_factory_refuses_its_other_losses(seed: int, tmp_path: Any, monkeypatch: Any) -> None:
    recipe = make_recipe(tmp_path, seed, 2)
    run_exp = llama_factory(monkeypatch, recipe, tmp_path, dft=True)
    with pytest.raises(ValueError, match="`compute_loss_func` must be off"):
        run("LLaMA-Factory", recipe, run_exp.space)
