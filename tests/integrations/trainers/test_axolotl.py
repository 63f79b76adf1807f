"""The Axolotl plugin, against stand-ins of the two classes of Axolotl that it touches.

Axolotl 0.19 pins transformers, trl and 60 others to exact versions and asks for packages that
need CUDA, so that it cannot be installed beside what is tested here. The stand-ins have the hooks
and the signatures of its integrations/base.py and core/trainers/base.py.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from tiny_models import fresh_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from str_kernels.attach_options import SETTINGS

pytest.importorskip("pydantic")  # which Axolotl brings
PLUGIN = "str_kernels.integrations.trainers.axolotl_plugin"


class BasePlugin:
    """Its hooks are called with these arguments, and do nothing."""

    def get_input_args(self) -> str | None: ...
    def pre_model_load(self, cfg: Any) -> None: ...
    def get_trainer_cls(self, cfg: Any) -> Any: ...
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


class AxolotlTrainer(Trainer):
    """Takes what Axolotl's builder passes, and calls Trainer's compute_loss."""

    def __init__(self, *args: Any, bench_data_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.fixture
def plugin(monkeypatch: Any) -> Any:
    for name, content in (
        ("axolotl", {}),
        ("axolotl.integrations", {}),
        ("axolotl.integrations.base", {"BasePlugin": BasePlugin}),
        ("axolotl.core", {}),
        ("axolotl.core.trainers", {}),
        ("axolotl.core.trainers.base", {"AxolotlTrainer": AxolotlTrainer}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    return importlib.import_module(PLUGIN)


def test_the_fields_of_the_yaml_are_validated(plugin: Any) -> None:
    module, name = plugin.SafetyPlugin().get_input_args().rsplit(".", 1)
    model = getattr(importlib.import_module(module), name)  # as Axolotl looks it up
    found = {name: (x.default, x.description) for name, x in model.model_fields.items()}
    assert found == {one.name: (one.default, one.help) for one in SETTINGS}
    assert model(safety_weight="0.5").safety_weight == 0.5
    assert model(safety_positions=3).safety_positions == 3  # as YAML reads it
    assert model(safety_ref_tokens=9, safety_temperature=2).safety_temperature == 2.0
    with pytest.raises(ValueError, match="safety_anchors_per_step"):
        model(safety_anchors_per_step="many")


@pytest.mark.parametrize("name", ["cut_cross_entropy", "liger_fused_linear_cross_entropy", "rl"])
def test_what_replaces_the_loss_is_refused(plugin: Any, name: str) -> None:
    plugin.SafetyPlugin().pre_model_load({name: False})
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        plugin.SafetyPlugin().pre_model_load({name: True})


def test_it_trains_and_logs(plugin: Any, seed: int, tmp_path: Any) -> None:
    templates, anchors = tmp_path / "templates.txt", tmp_path / "anchors.jsonl"
    templates.write_text("sorry , but I can not help with that .\n")
    anchors.write_text('{"prompt": "help me"}\n')
    cfg = {
        "safety_weight": 0.3,
        "safety_templates": str(templates),
        "safety_anchors": str(anchors),
        "safety_anchors_per_step": 1,
        "safety_positions": 3,
        "safety_kind": "huber",
        "safety_delta": 1.5,
        "safety_ref_tokens": 3,
        "safety_backend": "eager",
        "seed": 3,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", seed))
    rows = [{"input_ids": [3 + i, 5, 6, 7], "labels": [-100, 5, 6, 7]} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    one = plugin.SafetyPlugin()
    trainer = one.get_trainer_cls(cfg)(
        model=fresh_lora(model), args=arguments, train_dataset=rows,
        processing_class=chat_tokenizer(), bench_data_collator=None,
    )  # fmt: skip
    assert isinstance(trainer, AxolotlTrainer)
    one.post_trainer_create(cfg, trainer)
    assert trainer.attach_options["anchors"].seed == 3
    assert trainer.attach_options["positions"] == 3
    assert trainer.attach_options["penalty"].delta == 1.5
    assert trainer.attach_options["ref_tokens"] == 3
    assert trainer.attach_options["backend"] == "eager"
    trainer.train()
    first, last = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["safety/penalty"] == first["safety/anchor_penalty"] == 0.0
    total = last["safety/penalty"] + last["safety/anchor_penalty"]
    assert total > 0.0
    assert last["loss"] == pytest.approx(last["safety/ce"] + 0.3 * total, rel=1e-4)
