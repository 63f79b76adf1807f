"""What the package uses of torch, transformers and PEFT that they may rename without a word.

Private names, parts of layers that only their authors' own code reads, and public names that are
asked for with a default, so that a rename would go unnoticed. INTERNALS is all of them, and each
has a test that says what it breaks. What is documented, and raises when it is gone, is not here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from tiny_models import fresh_lora, tiny_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from str_kernels.integrations.models import adapters as ours

ROOT = Path(__file__).parents[3]
FILES = [p for folder in ("str_kernels", "integrations") for p in (ROOT / folder).rglob("*.py")]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(FILES)}


def a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


class Internal(NamedTuple):
    names: str  # as our code spells them, but for SPELT
    holder: str  # a key of the fixture `holders`, or a module
    file: str  # of ours, which uses them
    why: str  # no public name does
    purpose: str  # that it breaks without
    holds: Callable[[Any], bool] = callable


NOT_SAID = "PEFT computes with it and has no way to ask for it"
SILENT = "public, but asked for with a default: a rename would go unnoticed"
HEAD, COPY = "the linear path with an adapter on the head", "a trained copy of the head"
OFF, MIXTURE = "refusing a model whose adapters are off", "training a mixture of experts"
FAKE = "planning memory without weights"
PROMPT, LIGER = "prompt learning as its own reference", "refusing Liger's own loss"

INTERNALS = [
    Internal("_version", "tensor", "contracts.py", "torch counts writes nowhere else",
             "copying id_weights anew once somebody wrote into them", a(int)),
    Internal("get_cpp_compiler", "torch._inductor.cpp_builder", "backends.py",
             "torch.compile fails only once it compiles", "saying that a compiler is missing"),
    Internal("_resolve_process_group", "torch.distributed.distributed_c10d", "parallel.py",
             "an op's schema holds no group, and no public function finds one by its name",
             "a vocabulary spread over ranks"),
    Internal("unshard reshard", "fsdp", "sharded_weights.py", SILENT,
             "a head that is an FSDP2 unit of its own, and refusing a sharded model"),
    Internal("full_tensor", "dtensor", "sharded_weights.py", SILENT, "looking at a spread head"),
    Internal("device_mesh", "dtensor", "sharded_weights.py", SILENT,
             "telling that a head is spread", a(property)),
    Internal("peft.tuners.lora.layer.Linear", "classes", "heads.py",
             "isinstance takes its subclasses for it, and peft need not be there", HEAD),
    Internal("lora_A lora_B lora_dropout", "LoRA", "heads.py", NOT_SAID, HEAD, a(nn.ModuleDict)),
    Internal("scaling", "LoRA", "heads.py", NOT_SAID, HEAD, a(dict)),
    Internal("lora_magnitude_vector", "LoRA", "heads.py", NOT_SAID, "DoRA on the head",
             lambda of: of["default"].weight.ndim == 1),
    Internal("lora_variant", "LoRA", "heads.py", NOT_SAID, "telling DoRA on the head from others",
             lambda of: set(of) == {"default"}),
    Internal("get_base_layer", "LoRA", "heads.py", NOT_SAID, HEAD),
    Internal("active_adapters", "LoRA", "heads.py", NOT_SAID, HEAD, a(list)),
    Internal("disable_adapters", "LoRA", "adapters.py", SILENT, OFF, a(bool)),
    Internal("merged", "LoRA", "adapters.py", SILENT, f"{OFF} or merged", a(bool)),
    Internal("adapter_layer_names other_param_names", "LoRA", "adapters.py", NOT_SAID,
             "telling what stays trainable with the adapters off", a(tuple)),
    Internal("base_layer", "LoRA", "fingerprint.py", NOT_SAID,
             "one fingerprint with adapters and without", a(nn.Linear)),
    Internal("original_module", "copy", "fingerprint.py", NOT_SAID, COPY, a(nn.Linear)),
    Internal("gradient_checkpointing", "decoder", "modes.py", SILENT,
             "the reference of packed rows under checkpointing", a(bool)),
    Internal("gradient_checkpointing _gradient_checkpointing_func", "checkpointed",
             "passes.py", "nothing else says whether it is reentrant",
             "refusing anchors with reentrant checkpointing on several ranks",
             lambda of: of is True or of.keywords == {"use_reentrant": True}),
    Internal("modules_to_save", "copy", "heads.py", NOT_SAID, COPY, a(nn.ModuleDict)),
    Internal("original_module", "copy", "heads.py", NOT_SAID, COPY, a(nn.Linear)),
    Internal("active_adapters", "copy", "heads.py", NOT_SAID, COPY, a(list)),
    Internal("disable_adapters", "copy", "adapters.py", SILENT, OFF, a(bool)),
    Internal("prompt_encoder", "prompt", "adapters.py", SILENT, PROMPT, a(nn.ModuleDict)),
    Internal("kwargs", "PeftModel.forward", "references.py", "the name is a parameter's", PROMPT),
    Internal("logits_to_keep", "forward", "forward.py", SILENT, "refusing it with labels"),
    Internal("num_items_in_batch", "compute_loss", "forward.py", SILENT,
             "exact accumulation"),
    Internal("model_accepts_loss_kwargs", "trainer", "hf_trainer.py",
             "nothing else says whether Trainer divides by num_items_in_batch",
             "the mean of safety/ce and safety/penalty in the log", a(bool)),
    Internal("_attn_implementation", "config", "finetune/report.py",
             "transformers says in no other place which attention a model has",
             "saying where memory grows with the square of the rows' length", a(str)),
    Internal("use_liger_kernel liger_kernel_config", "arguments", "hf_trainer.py", SILENT, LIGER,
             a(bool, type(None))),
    Internal("get_cp_size get_sp_size", "trainer", "hf_trainer.py", SILENT,
             "refusing anchors where a rank sees a part of each row"),
    Internal("is_deepspeed_zero3_enabled", "transformers.integrations", "hf_trainer.py",
             "transformers exports it from there alone", "SafetyTrainer under ZeRO-3"),
    Internal("__dataclass_fields__", "output", "forward.py",
             "no method makes an output anew",
             "returning the model's own class of output", lambda of: {"loss", "logits"} <= set(of)),
    Internal("aux_loss", "output", "own_loss.py", SILENT, MIXTURE, a(torch.Tensor)),
    Internal("router_aux_loss_coef", "mixtral", "own_loss.py",
             "it is what forward multiplies with, wherever a config has it", MIXTURE, a(float)),
    Internal("FusedCausalLMOutput", "trl.trainer.utils", "trl_sft.py",
             "SFTTrainer reads its fields, and no public name makes one", "TRL's own metrics"),
    Internal("FakeTensorMode", "torch._subclasses", "memory_ledger.py",
             "the guide to torch.compile has it under this name", FAKE),
    Internal("TorchDispatchMode", "torch.utils._python_dispatch", "memory_ledger.py",
             "nothing public sees each op that runs", FAKE),
    Internal("find_packed_sequence_indices", "transformers.masking_utils", "memory_ledger.py",
             SILENT, "planning without the mask of packed rows"),
    Internal("GGUF_CONFIG_MAPPING", "transformers.integrations.ggml", "builtin_model.py",
             "the reader leaves the file's name in the config", "the built-in model's config",
             lambda read: "_model_name_or_path" in read["general"].values()),
]  # fmt: skip
SPELT = {
    "peft.tuners.lora.layer.Linear": '("peft.tuners.lora.layer", "Linear")',
    "__dataclass_fields__": "dataclasses.fields(output)",
    "GGUF_CONFIG_MAPPING": "_model_name_or_path",
}
ALLOWED = {"_asdict", "_fields", "_make", "_replace"}  # of a NamedTuple: public, says Python
ALLOWED |= {"_copies", "_decks"}  # keys of our own


@pytest.fixture(scope="module")
def holders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Make one of each thing with such names; dicts stand for what has no attributes."""
    lora = fresh_lora(tiny_model("llama", 0), target_modules=["q_proj", "lm_head"], use_dora=True)
    layer = lora.get_base_model().get_output_embeddings()
    copied = fresh_lora(tiny_model("llama", 0), modules_to_save=["lm_head"])
    virtual = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompt = get_peft_model(tiny_model("llama", 0), virtual)
    mixtral = tiny_model("mixtral", 0)
    checkpointing = tiny_model("llama", 0)
    enable = getattr(checkpointing, "activation_checkpointing_enable", None)
    enable = enable or checkpointing.gradient_checkpointing_enable  # its name before 5.20
    enable({"use_reentrant": True})
    checkpointed = checkpointing.model
    arguments = transformers.TrainingArguments(str(tmp_path_factory.mktemp("trainer")))
    trainer = transformers.Trainer(tiny_model("llama", 0), arguments)

    def parameters(function: Any) -> dict[str, Any]:
        return dict.fromkeys(inspect.signature(function).parameters, callable)

    return {
        "PeftModel.forward": parameters(prompt.forward),
        "forward": parameters(mixtral.forward),
        "compute_loss": parameters(trainer.compute_loss),
        "classes": {f"{type(layer).__module__}.{type(layer).__name__}": type(layer)},
        "LoRA": layer,
        "copy": copied.get_base_model().get_output_embeddings(),
        "prompt": prompt,
        "mixtral": mixtral,
        "config": mixtral.config,
        "decoder": mixtral.model,
        "checkpointed": checkpointed,
        "output": mixtral(torch.tensor([[3, 4, 5]])),
        "trainer": trainer,
        "arguments": arguments,
        "tensor": torch.zeros(1),
        "fsdp": FSDPModule,
        "dtensor": DTensor,
    }


@pytest.mark.parametrize(
    ("name", "internal"), [(name, row) for row in INTERNALS for name in row.names.split()]
)
def test_an_internal_name_is_there(name: str, internal: Internal, holders: dict[str, Any]) -> None:
    _, where, file, why, purpose, holds = internal
    if where.startswith("trl"):
        pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
    try:
        holder = holders[where] if where in holders else import_module(where)
        value = holder[name] if type(holder) is dict else getattr(holder, name)
    except (AttributeError, KeyError, ImportError):
        pytest.fail(f"`{name}` of {where} is gone. {file} has it for {purpose}. ({why})")
    assert holds(value), f"`{name}` of {where} is now {value!r}. {file} has it for {purpose}"


@pytest.mark.skipif(not hasattr(peft, "KasaConfig"), reason="older PEFT has not all of them yet")
def test_what_decides_over_adapters_is_still_called_that() -> None:
    """A renamed option or type of PEFT's would no longer be refused, or no longer be let in."""
    gone = {*ours._LAYERS, *ours._VIRTUAL_TOKENS, *ours._OWN_LOSS} - set(peft.PeftType.__members__)
    options = {*ours._OPTIONS_AGAINST, "init_lora_weights", "bias"}
    gone |= options - set(peft.LoraConfig.__dataclass_fields__)
    assert not gone, f"{sorted(gone)} of PEFT are gone: see integrations/models/adapters.py"


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_(?!_)\w+", name) is not None


def own_names(tree: ast.Module) -> set[str]:
    """Collect what a file gives a name: methods, functions, fields, attributes that it sets."""
    nodes = list(ast.walk(tree))
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    return named.union(getattr(node, "attr", getattr(node, "id", "")) for node in stored)


def foreign_names(tree: ast.Module) -> list[str]:
    """List every private name and every module inside Hugging Face's that a file uses."""
    found = []
    for node in ast.walk(tree):
        names = [getattr(node, "attr", None), getattr(node, "value", None)]  # or for getattr()
        found += [name for name in names if is_private(name)]
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [str(node.module)]
        found += [m for m in modules if re.match(r"(transformers|peft|accelerate|trl)\.|.*\._", m)]
    return found


def test_no_other_private_name_is_used() -> None:
    listed = {name for row in INTERNALS for name in (row.holder, *row.names.split())}
    listed = listed.union(SPELT.values(), ALLOWED)
    for path, source in SOURCES.items():
        tree = ast.parse(source)
        found = set(foreign_names(tree)) - listed - own_names(tree)
        assert not found, f"{path.name} uses {found}: not its own, and not in INTERNALS"


def test_each_internal_is_used() -> None:
    for internal in INTERNALS:
        (source,) = (
            text for path, text in SOURCES.items() if str(path).endswith(f"/{internal.file}")
        )
        unused = [name for name in internal.names.split() if SPELT.get(name, name) not in source]
        assert not unused, f"{unused}: take them off the list of {internal.file}"


def test_our_trainer_takes_no_name_of_transformers(holders: dict[str, Any]) -> None:
    own = own_names(ast.parse(SOURCES[ROOT / "integrations" / "trainers" / "hf_trainer.py"]))
    assert not set(filter(is_private, own)) & set(dir(holders["trainer"]))
