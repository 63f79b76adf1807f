"""The ms-swift plugin, against stand-ins of what it touches, and against swift where it is there.

ms-swift 4.6 allows transformers up to 5.19, peft below 0.21 and trl below 1.0, so that it cannot be
installed beside what is tested here. The stand-ins have the names and the signatures of its
trainers/, and its compute_loss in the two cases that matter: who makes the loss, and how it is
scaled. The last test runs the command itself, in an environment that has it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import python_blocks
from recipe_setup import TURNS, Recipe, assert_same_logs, make_recipe
from tiny_tokenizer import save_tiny_model
from transformers import Seq2SeqTrainer as HfTrainer
from transformers import Seq2SeqTrainingArguments

from str_kernels import AnchorPrompts
from str_kernels.attach_options import SETTINGS, SafetySettings

PLUGIN = "str_kernels.integrations.trainers.swift_plugin"
(BLOCK,) = (block for block in python_blocks("docs/trainers.md") if "swift_plugin" in block)
REAL = "ms-swift" in {  # `swift` alone may be another project's package
    one.metadata["Name"].replace("_", "-") for one in importlib.metadata.distributions()
}


@dataclass
class SwiftArguments(Seq2SeqTrainingArguments):
    loss_type: str | None = None
    enable_dft_loss: bool = False
    enable_channel_loss: bool = False


class Seq2SeqTrainer(HfTrainer):
    """swift's, as far as the loss goes."""

    def __init__(self, model: Any, args: Any, template: Any, train_dataset: Any, **kw: Any) -> None:
        self.template = template
        if args.loss_type is not None:
            kw["compute_loss_func"] = lambda outputs, labels, num_items_in_batch: outputs.logits
        kw |= {"data_collator": template.data_collator, "processing_class": template.tokenizer}
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kw)
        self.model_accepts_loss_kwargs = True

    def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
        return default_value

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        if self.get_use_logits_to_keep(True):
            inputs["logits_to_keep"] = inputs["labels"].shape[1]
        return inputs

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * ((inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Template:
    """swift's, as far as the loss goes: its own is the model's."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def compute_sft_loss(self, model: Any, inputs: Any, *, trainer: Any) -> Any:
        return trainer.compute_loss(model, inputs)


class TemplateWithALoss(Template):
    def compute_sft_loss(self, model: Any, inputs: Any, *, trainer: Any) -> Any:
        return model(**inputs).logits.mean()


class TrainerFactory:
    TRAINER_MAPPING: dict[str, str]

    @classmethod
    def trainer_of(cls, task_type: str) -> Any:
        module, name = cls.TRAINER_MAPPING[task_type].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


@pytest.fixture
def plugin(monkeypatch: Any) -> Any:
    mapping = {"causal_lm": "swift.trainers.Seq2SeqTrainer", "dpo": "swift.rlhf_trainers.DPO"}
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", mapping, raising=False)
    trainers = types.ModuleType("swift.trainers")
    vars(trainers).update(Seq2SeqTrainer=Seq2SeqTrainer, TrainerFactory=TrainerFactory)
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.trainers", trainers)
    templates = types.ModuleType("swift.template")
    vars(templates).update(Template=Template)
    monkeypatch.setitem(sys.modules, "swift.template", templates)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def test_every_setting_is_a_keyword(plugin: Any) -> None:
    plugin.register(**{one.name: one.default for one in SETTINGS})
    assert vars(plugin.SafetySwiftTrainer.settings) == vars(SafetySettings())
    with pytest.raises(ValueError, match="`safety_path` must be one of linear, logits; got 'head'"):
        plugin.register(safety_path="head")


def template_of(recipe: Recipe, **options: Any) -> Any:
    attributes = {
        "tokenizer": recipe.tokenizer,
        "data_collator": recipe.collator,
        "sequence_parallel_size": 1,
        "is_binary_loss_scale": None,
        "loss_scale": types.SimpleNamespace(is_binary_loss_scale=True),
    }
    return Template(**{**attributes, **options})


def trainer_of(recipe: Recipe, folder: Path, template: Any = None, **options: Any) -> Any:
    arguments = SwiftArguments(**{**recipe.arguments(folder), "seed": 5, **options})
    return TrainerFactory.trainer_of("causal_lm")(
        model=recipe.make_model(),
        args=arguments,
        template=template or template_of(recipe),
        train_dataset=recipe.rows,
    )


def import_as_swift_does(path: Path) -> None:
    """By its path, as a module of no package: a relative import would fail."""
    spec = importlib.util.spec_from_file_location("_external", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_pages_file_registers(plugin: Any, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "safety.py"
    path.write_text(BLOCK, encoding="utf-8")
    import_as_swift_does(path)
    trainer = trainer_of(make_recipe(tmp_path, seed, 2), tmp_path)
    assert isinstance(trainer, Seq2SeqTrainer)
    anchors = trainer.attach_options["anchors"]
    assert (anchors.per_step, anchors.harmless_per_step, anchors.seed) == (2, 2, 5)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_it_trains_and_logs(
    plugin: Any, accumulation: int, anchored: bool, seed: int, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, seed, accumulation, anchored)
    weight = 0.1
    plugin.register(safety_weight=weight, safety_positions="response" if anchored else "none")
    trainer = trainer_of(recipe, tmp_path)
    anchors = recipe.options.get("anchors") or AnchorPrompts.default(recipe.tokenizer)
    trainer.attach_options["anchors"] = anchors
    trainer.train()
    assert_same_logs(trainer, recipe)
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        penalties = entry["safety/penalty"] + entry["safety/anchor_penalty"]
        assert entry["safety/anchor_penalty"] > 0
        assert entry["loss"] == pytest.approx(entry["safety/ce"] + weight * penalties, rel=1e-6)
    trainer.model.eval()
    assert trainer.get_use_logits_to_keep(True)  # evaluation keeps what swift keeps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "cross_entropy"),
        ("enable_dft_loss", True),
        ("enable_channel_loss", True),
        ("label_smoothing_factor", 0.1),
        ("sequence_parallel_size", 2),
        ("is_binary_loss_scale", False),
        ("loss_scale", types.SimpleNamespace(is_binary_loss_scale=False)),
    ],
)
def test_what_replaces_the_loss_is_refused(
    plugin: Any, name: str, value: Any, seed: int, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, seed, 2)
    plugin.register()
    options = {name: value}
    of_template = hasattr(template_of(recipe), name)
    template = template_of(recipe, **(options if of_template else {}))
    said = {"is_binary_loss_scale": "loss_scale"}.get(name, name)
    with pytest.raises(ValueError, match=f"`{said}`.* must be"):
        trainer_of(recipe, tmp_path, template, **({} if of_template else options))


def test_a_template_with_a_loss_is_refused(plugin: Any, seed: int, tmp_path: Path) -> None:
    plugin.register()
    recipe = make_recipe(tmp_path, seed, 1)
    with pytest.raises(ValueError, match=r"leave the loss to the model.*got TemplateWithALoss"):
        trainer_of(recipe, tmp_path, TemplateWithALoss(**vars(template_of(recipe))))


def test_other_trainers_are_refused(plugin: Any) -> None:
    plugin.register()
    with pytest.raises(ValueError, match="`task_type` must be 'causal_lm'"):
        TrainerFactory.trainer_of("dpo")(model=None, args=None)


def test_megatron_is_refused(plugin: Any, monkeypatch: Any) -> None:
    arguments = "swift.megatron.arguments"
    monkeypatch.setitem(sys.modules, arguments, types.ModuleType(arguments))
    with pytest.raises(ValueError, match=r"`external_plugins` must not .* Megatron"):
        plugin.register()


def test_a_setting_that_is_none_is_refused(plugin: Any) -> None:
    with pytest.raises(TypeError, match=r"`safety_wieght` must be one of .*; got .*=0.1"):
        plugin.register(safety_wieght=0.1)


@pytest.mark.skipif(not REAL, reason="ms-swift is not installed, nor can it be beside this trl")
def test_the_command_itself(seed: int, tmp_path: Path) -> None:
    model, data, plugin = (tmp_path / name for name in ("model", "data.jsonl", "safety.py"))
    save_tiny_model(model, seed)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in TURNS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plugin.write_text(BLOCK, encoding="utf-8")
    flags = {
        "external_plugins": plugin, "model": model, "dataset": data, "output_dir": tmp_path / "run",
        "model_type": "llama", "template": "chatml", "attn_impl": "eager", "use_hf": "true",
        "tuner_type": "lora", "target_modules": "q_proj", "lora_dropout": 0, "max_steps": 3,
        "torch_dtype": "float32", "per_device_train_batch_size": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 0.1, "check_model": "false",
        "save_strategy": "no", "report_to": "none", "dataloader_num_workers": 0,
        "split_dataset_ratio": 0, "use_cpu": "true",
    }  # fmt: skip
    command = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    swift = Path(sys.executable).with_name("swift")
    run = subprocess.run(
        [str(swift), "sft", *command], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    (log,) = (tmp_path / "run").glob("*/logging.jsonl")
    history = json.loads(log.read_text("utf-8").splitlines()[-1])["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 3 and entries[0]["safety/penalty"] == 0.0
    for entry in entries:
        penalty = entry["safety/anchor_penalty"]
        assert entry["loss"] == pytest.approx(entry["safety/ce"] + 0.1 * penalty, rel=1e-5)
    assert penalty > 1e-5
