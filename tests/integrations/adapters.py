"""Every adapter of PEFT that fits a causal LM, tiny, and what attach() makes of it.

The table is read by test_adapters.py, which holds each verdict, and by support.py, which prints it.
The reference of a verdict is never the adapter switched off: it is a copy made before PEFT saw the
model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from loss_checks import IDS, ON_ROWS, TOKENS, WEIGHT
from peft import get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn

from str_kernels import attach

VIRTUAL = 3  # tokens of prompt learning
LOSS_BOUND, GRADIENT_BOUND = 2e-5, 1e-3

TRAINED = list(range(3, 70))  # tokens; some are in every batch
LINEAR = ["q_proj", "v_proj"]
HEAD = [*LINEAR, "lm_head"]


@dataclass(frozen=True)
class Adapter:
    """One configuration, and the verdict that the tests hold.

    Attributes:
        config: the name of PEFT's config class.
        options: what it is given; `task_type` and the target modules are added.
        refused: a part of the reason, where attach() without a reference refuses; "" where exact.
        path: the path on which it is exact. On "logits" alone: the linear one refuses the head.
        model: which tiny model carries it.
        inputs: names of further inputs, (B,) zeros.
        note: what a reader of the table must know.
    """

    config: str
    options: dict[str, Any]
    refused: str = ""
    path: str = "linear"
    model: str = "llama"
    note: str = ""
    inputs: tuple[str, ...] = ()


def _lora(refused: str = "", path: str = "linear", model: str = "llama", note: str = "", **o: Any):
    return Adapter(
        "LoraConfig", {"r": 4, "target_modules": LINEAR, **o}, refused, path, model, note
    )


def _layer(config: str, refused: str = "", **options: Any) -> Adapter:
    return Adapter(config, {"target_modules": LINEAR, **options}, refused)


def _prompt(config: str, refused: str = "", inputs: tuple[str, ...] = (), **o: Any) -> Adapter:
    return Adapter(config, {"num_virtual_tokens": VIRTUAL, **o}, refused, inputs=inputs)


BASE_MOVES = "which changes the base weights"
UNSEEN = "not seen to give the model back"

LORA = {
    "LoRA": _lora(),
    "LoRA, tied head": _lora(model="llama-tied"),
    "rsLoRA": _lora(use_rslora=True),
    "DoRA": _lora(use_dora=True),
    "LoRA with lora_bias": _lora(lora_bias=True),
    "LoRA, rank and alpha patterns": _lora(
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16}, target_modules=LINEAR
    ),
    "LoRA on every linear layer": _lora(target_modules="all-linear"),
    "LoRA on fused experts (target_parameters)": _lora(
        model="mixtral", target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    ),
    "LoRA, initialised gaussian": _lora(init_lora_weights="gaussian"),
    "LoRA, initialised orthogonal": _lora(init_lora_weights="orthogonal"),
    "LoRA, initialised False": _lora(init_lora_weights=False),
    "LoRA on the head": _lora(target_modules=HEAD),
    "LoRA on the head, lora_bias": _lora(target_modules=HEAD, lora_bias=True),
    "LoRA on a tied head": _lora(target_modules=HEAD, model="llama-tied"),
    "DoRA on the head": _lora(target_modules=HEAD, use_dora=True, note="makes a scaled copy of W"),
    "LoRA on the embeddings": _lora(target_modules=[*LINEAR, "embed_tokens"]),
    "LoRA, trained copy of the head": _lora(modules_to_save=["lm_head"]),
    "LoRA, trained copy of the embeddings": _lora(modules_to_save=["embed_tokens"]),
    "LoRA, trained copies of both": _lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA, trainable tokens": _lora(trainable_token_indices=TRAINED),
    "LoRA, trainable tokens, tied head": _lora(
        trainable_token_indices=TRAINED, model="llama-tied", path="logits"
    ),
    "LoRA on a tied head, tied (ensure_weight_tying)": _lora(
        target_modules=HEAD, ensure_weight_tying=True, model="llama-tied"
    ),
    "DoRA on a tied head": _lora(target_modules=HEAD, use_dora=True, model="llama-tied"),
    "LoRA on a capped head": _lora(target_modules=HEAD, model="gemma2"),
    "LoRA on a scaled head": _lora(target_modules=HEAD, model="granite"),
    "DoRA on the head, dropout": _lora(
        target_modules=HEAD, use_dora=True, lora_dropout=0.2, path="logits"
    ),
    "BD-LoRA": _lora(
        use_bdlora={"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}
    ),
    "VeLoRA": _lora(velora_config={"num_groups": 4}),
    "LoRA, initialised mica": _lora(init_lora_weights="mica"),
    "aLoRA": _lora("changes with the tokens", alora_invocation_tokens=[5]),
    "MonteCLoRA": _lora("at random", monteclora_config={}),
    "KaSA": _lora("takes part of the base weights", kasa_config={}),
    "LoRA, initialised pissa": _lora(BASE_MOVES, init_lora_weights="pissa"),
    "LoRA, initialised olora": _lora(BASE_MOVES, init_lora_weights="olora"),
    "LoRA, bias='all'": _lora("trains biases", bias="all", model="qwen2"),
    "LoRA, bias='lora_only'": _lora("trains biases", bias="lora_only", model="qwen2"),
    "LoRA, replicated layers": _lora("layer_replication", layer_replication=[(0, 2), (1, 2)]),
}
LAYERS = {
    "AdaLoRA": _layer("AdaLoraConfig", total_step=10, init_r=4, target_r=2),
    "BEFT": _layer("BeftConfig"),
    "BOFT": _layer("BOFTConfig", boft_block_size=4),
    "C3A": _layer("C3AConfig", block_size=8),
    "DEFT": _layer("DeftConfig", r=4),
    "DeLoRA": _layer("DeloraConfig", r=4),
    "FourierFT": _layer("FourierFTConfig", n_frequency=50),
    "FRoD": _layer("FrodConfig", progressbar=False),
    "GLoRA": _layer("GloraConfig", r=4),
    "GraLoRA": _layer("GraloraConfig", r=4),
    "HiRA": _layer("HiraConfig", r=4),
    "HRA": _layer("HRAConfig", r=4),
    "IA3": _layer(
        "IA3Config", target_modules=[*LINEAR, "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LiLY": _layer("LilyConfig", r=4),
    "LayerNorm tuning": _layer("LNTuningConfig", target_modules=["input_layernorm"]),
    "LoHa": _layer("LoHaConfig", r=4),
    "LoKr": _layer("LoKrConfig", r=4),
    "MiSS": _layer("MissConfig", r=4),
    "OFT": _layer("OFTConfig", oft_block_size=8),
    "OSF": _layer("OSFConfig", effective_rank=4),
    "PEANuT": _layer("PeanutConfig", r=4),
    "PSOFT": _layer("PsoftConfig", r=4),
    "PVeRA": _layer("PveraConfig", r=4),
    "RandLoRA": _layer("RandLoraConfig", r=4),
    "RoAd": _layer("RoadConfig", group_size=8),
    "SHiRA": _layer("ShiraConfig", r=4),
    "Supertuning": _layer("SupertuningConfig"),
    "TinyLoRA": _layer("TinyLoraConfig", u=8),
    "Trainable tokens": Adapter("TrainableTokensConfig", {"token_indices": TRAINED}),
    "Uni-LoRA": _layer("UniLoraConfig"),
    "VB-LoRA": _layer("VBLoRAConfig", vector_length=8, num_vectors=16),
    "VeRA": _layer("VeraConfig", r=4),
    "WaveFT": _layer("WaveFTConfig", n_frequency=50),
    "Poly": _layer("PolyConfig", UNSEEN, r=4, n_tasks=1),
    "LLaMA-Adapter": Adapter(
        "AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}, UNSEEN
    ),
}
PROMPTS = {
    "Prompt tuning": _prompt("PromptTuningConfig"),
    "P-tuning": _prompt("PromptEncoderConfig", encoder_hidden_size=16),
    "Prefix tuning": _prompt("PrefixTuningConfig"),
    "Prefix tuning, projected": _prompt(
        "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=16
    ),
    "Multitask prompt tuning": _prompt(
        "MultitaskPromptTuningConfig", num_tasks=1, inputs=("task_ids",)
    ),
    "Cartridge": _prompt("CartridgeConfig"),
    "CPT": _prompt(
        "CPTConfig", "computes another", cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3,
        cpt_tokens_type_mask=[1, 2, 3],
    ),
}  # fmt: skip
ADAPTERS = {**LORA, **LAYERS, **PROMPTS}


def is_there(adapter: Adapter) -> bool:
    """Say whether this release of PEFT has the class and every option."""
    fields = getattr(getattr(peft, adapter.config, None), "__dataclass_fields__", {})
    init = adapter.options.get("init_lora_weights")
    if isinstance(init, str) and init not in str(fields["init_lora_weights"].type):
        return False
    return bool(fields) and set(adapter.options) <= set(fields)


def build(adapter: Adapter, seed: int) -> tuple[Any, Any]:
    """Return the model with an adapter that has moved, and a copy from before PEFT saw it."""
    model = tiny_model(adapter.model, seed)
    pristine = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of merging, of its own CUDA, of what it compiles
        config = getattr(peft, adapter.config)(task_type="CAUSAL_LM", **adapter.options)
        peft_model = get_peft_model(model, config)
    move(peft_model, seed)
    return peft_model.train(), pristine


def move(model: nn.Module, seed: int) -> None:
    """Shake what is trainable: most adapters start as the identity, with no drift to see."""
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def errors(
    model: Any, pristine: Any, batch: dict[str, Tensor], **options: Any
) -> tuple[float, float]:
    """Return how far attach() is from two sets of full logits: in the loss, and in a gradient.

    The first is relative; the second a part of the largest entry of that parameter's gradient,
    beyond a rounding's part of the largest of all.
    """
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "task_ids")}
    with torch.no_grad():
        ref_logits = pristine(**inputs).logits

    def naive() -> Tensor:
        output = model(**batch)
        logits = output.logits[:, -batch["labels"].shape[1] :]  # without the virtual tokens
        kept = batch["labels"][:, 1:] != -100
        drift = (logits - ref_logits)[:, :-1][kept][:, IDS]
        loss: Tensor = output.loss + WEIGHT * drift.square().mean(dim=-1).sum() / kept.sum()
        return loss

    wanted_loss, wanted = _step(model, naive)
    with attach(model, TOKENS, **ON_ROWS, **options) as handle:
        got_loss, got = _step(model, lambda: model(**batch).loss)
        assert handle.last is not None and float(handle.last.penalty) > 0.0  # there is a drift
    assert wanted and got.keys() == wanted.keys()
    floor = 1e-6 * max(float(grad.abs().max()) for grad in wanted.values())
    worst = max(
        (float((got[name] - grad).abs().max()) - floor) / max(float(grad.abs().max()), 1e-30)
        for name, grad in wanted.items()
    )
    return abs(got_loss / wanted_loss - 1), worst


def assert_exact(model: Any, pristine: Any, batch: dict[str, Any], **options: Any) -> None:
    loss, gradient = errors(model, pristine, batch, **options)
    assert loss <= LOSS_BOUND and gradient <= GRADIENT_BOUND, (loss, gradient)


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Run one step; the random numbers of an adapter that draws some are the same in each."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of()
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
