"""PEFT adapters: switched off, they turn the model into its own reference.

A reference that moves with the student would silently make the penalty meaningless. So adapters
are accepted only where tests showed that switching them off is exact; all others are refused with
the reason. docs/support.md, which a command writes, lists the results.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

from torch import nn

from .modes import is_packed, not_compiled

# The names in peft.PeftType whose removal gives back the model that was loaded. A test compares
# each with a copy made before PEFT changed the model (docs/support.md). A type in none of these
# lists is refused until somebody tests it.
_LAYERS = (
    "ADALORA BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING "
    "LOHA LOKR LORA MISS OFT OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA "
    "TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT"
).split()
_VIRTUAL_TOKENS = "CARTRIDGE MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING".split()
_OWN_LOSS = ("CPT", "XLORA")
# Initialisations of LoRA after which "adapters off" is still the model that was loaded. The others
# (PiSSA, OLoRA, LoftQ, CorDA, ...) move part of the base weight into the adapter.
_SAFE_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Options of LoRA that do more than add a product, and what they do.
_OPTIONS_AGAINST = {
    "layer_replication": "replicates layers of the base model",
    "kasa_config": "takes part of the base weights away",
    "monteclora_config": "draws its weights at random in each forward",
    "alora_invocation_tokens": "changes with the tokens of each row",
    "arrow_config": "chooses among adapters for each token",
    "use_qalora": "was not seen to give the model back",
}
_INSTEAD = "Pass `ref_model`, a frozen copy of the aligned model."


def is_peft_model(model: nn.Module) -> bool:
    """Tell whether a model is a PeftModel, without importing peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def has_adapters(model: Any) -> bool:
    """Tell whether a model has PEFT adapters, in a PeftModel or from transformers' add_adapter."""
    if not getattr(model, "peft_config", None):
        return False
    # merge_and_unload() of PEFT 0.18 leaves the configs behind
    return is_peft_model(model) or any(map(_is_layer, model.modules()))


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "adapter_layer_names")


def base_of(model: Any) -> nn.Module:
    """Return the model that a PeftModel wraps, and any other model as it is."""
    base: nn.Module = model.get_base_model() if is_peft_model(model) else model
    return base


def is_prompt_learning(model: Any) -> bool:
    """Tell whether a model is a PeftModel that puts virtual tokens before its input."""
    return is_peft_model(model) and bool(model.active_peft_config.is_prompt_learning)


def check_student(model: Any) -> None:
    """Refuse adapters that compute a loss of their own, and adapters that are merged or off.

    Args:
        model: any model.

    Raises:
        ValueError: the message names the adapter and what is wrong with it.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if _type_of(config) in _OWN_LOSS:
            raise ValueError(
                f"`model` must compute its loss in its own forward; adapter {name!r} of type "
                f"{_type_of(config)} computes another"
            )
    _check_state(model)


def check_adapters(model: Any) -> None:
    """Refuse adapters whose removal does not give back the aligned model.

    Args:
        model: a model with adapters.

    Raises:
        ValueError: the message names the adapter, what is wrong with it and what to do.
    """
    for name, config in model.peft_config.items():
        reason = _reason_against(config)
        if reason:
            raise ValueError(
                f"`model` must be its own reference with its adapters off, but adapter {name!r} "
                f"{reason}. {_INSTEAD}"
            )
    if is_prompt_learning(model) and any(map(_is_layer, base_of(model).modules())):
        raise ValueError(
            "`model` must be its own reference without its virtual tokens, but it has other "
            "adapters below them; merge those first"
        )
    trainable = trainable_base_parameters(model)
    if trainable:
        raise ValueError(
            "`model` must have frozen base weights to be its own reference; trainable are "
            f"{', '.join(trainable[:3])}{' ...' if len(trainable) > 3 else ''}. "
            f"Freeze them. {_INSTEAD}"
        )


def check_start(model: Any) -> None:
    """Refuse a model whose adapters, as they are now, cannot be kept as a second adapter.

    Args:
        model: any model.

    Raises:
        ValueError: the message says why.
    """
    if not is_peft_model(model) or is_prompt_learning(model):
        raise ValueError(
            "`reference` must not be 'start' unless `model` is a PeftModel with adapters in its "
            "layers; pass `ref_model`, a frozen copy made before training"
        )
    if len(model.active_adapters) != 1:
        raise ValueError(
            "`reference` must not be 'start' with several active adapters; got "
            f"{model.active_adapters}"
        )
    if getattr(model.active_peft_config, "target_parameters", None):
        raise ValueError(
            "`reference` must not be 'start' with `target_parameters`: PEFT has no second adapter "
            "for them. Pass `ref_model`, a frozen copy made before training"
        )
    trainable = trainable_base_parameters(model)
    if trainable:
        raise ValueError(
            "`reference` must not be 'start' with trainable base weights, which move; trainable "
            f"are {', '.join(trainable[:3])}. Freeze them, or pass `ref_model`"
        )


AT_START = "safety_reference"
"""The name of the adapter that keeps a copy of the active one, made when attached."""


def keep_start(model: Any) -> None:
    """Copy the active adapter into a frozen one named AT_START."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    active = model.active_adapter
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = copy.deepcopy(model.peft_config[active])
    config.inference_mode = True
    for name in ("init_lora_weights", "init_weights"):
        if hasattr(config, name):
            setattr(config, name, True)  # PiSSA and similar ones would change the base again
    model.add_adapter(AT_START, config)
    state = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    copied = {name: value.detach().clone() for name, value in state.items()}
    set_peft_model_state_dict(model, copied, adapter_name=AT_START)
    model.set_adapter(active)
    known = {id(parameter) for parameter, _ in before}
    for parameter in model.parameters():
        if id(parameter) not in known:
            parameter.requires_grad_(False)
    _restore(before)


@contextlib.contextmanager
def adapter_at_start(model: Any) -> Iterator[None]:
    """Activate the kept adapter, then the other one again, restoring requires_grad."""
    _check_state(model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter
    try:
        _set_adapter(model, AT_START)
        yield
    finally:
        _set_adapter(model, active)
        _restore(before)


@not_compiled
def _set_adapter(model: Any, name: str) -> None:
    model.set_adapter(name)


def trainable_base_parameters(model: Any) -> list[str]:
    """Return the names of trainable parameters that belong to no adapter."""
    of_adapters = {id(parameter) for parameter in _adapter_parameters(model)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in of_adapters
    ]


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switch the adapters off, then on again, restoring requires_grad.

    PEFT's own context manager sets requires_grad of every adapter to True when it exits, even of
    frozen ones.

    Raises:
        ValueError: the adapters are off already, or merged into the weights.
    """
    _check_state(model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, before)
        off = model.disable_adapter() if is_peft_model(model) else _native_off(model)
        _enter(stack, off)
        try:
            yield
        finally:
            _leave(stack)


# torch.compile gains nothing from PEFT's switches, and fails to trace them.
@not_compiled
def _enter(stack: contextlib.ExitStack, context: AbstractContextManager[Any]) -> None:
    stack.enter_context(context)


@not_compiled
def _leave(stack: contextlib.ExitStack) -> None:
    stack.close()


def _restore(before: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in before:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _native_off(model: Any) -> Iterator[None]:
    """Do what PeftModel.disable_adapter does, for transformers' own add_adapter."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def _check_state(model: Any) -> None:
    """Refuse adapters that are off or merged into the weights, and layers without a backward."""
    for name, module in model.named_modules():
        if is_packed(module):
            raise ValueError(
                "`model` must be loaded anew to be trained: bitsandbytes packed the 4-bit weights "
                f"of {name} when it was run in eval mode on this CPU, and they have no backward now"
            )
        if getattr(module, "merged", False) is True:
            raise ValueError(
                f"`model` must not have its adapters merged while it trains; {name} has. Call "
                "unmerge_adapter(), or merge_and_unload() and pass `ref_model`"
            )
        if getattr(module, "disable_adapters", False) is True:
            raise ValueError(
                "`model` must not be used with its adapters off while it trains with the safety "
                f"loss, the reference would be compared with itself; those of {name} are off"
            )


def _adapter_parameters(model: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters that PEFT's layers list as their own, and prompt learning's encoder."""
    for module in model.modules():
        names = (
            *getattr(module, "adapter_layer_names", ()),
            *getattr(module, "other_param_names", ()),
            "prompt_encoder",
        )
        for name in names:
            try:
                part = attrgetter(name)(module)
            except AttributeError:
                continue
            if isinstance(part, nn.Parameter):
                yield part
            elif isinstance(part, nn.Module):
                yield from part.parameters()


def _type_of(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _reason_against(config: Any) -> str | None:
    kind = _type_of(config)
    if kind not in (*_LAYERS, *_VIRTUAL_TOKENS):
        return f"is of type {kind}, which was not seen to give the model back"
    inits = _SAFE_INITS if kind == "LORA" else (True, False, None, _default(config, "init_weights"))
    for name in ("init_lora_weights", "init_weights"):
        init = getattr(config, name, True)
        if init not in inits:
            return f"was initialised by {init!r}, which changes the base weights"
    bias = getattr(config, "bias", "none")
    if bias != "none":
        return f"trains biases of the base model (bias={bias!r})"
    for name, what in _OPTIONS_AGAINST.items():
        if getattr(config, name, None):
            return f"{what} ({name})"
    return None


def _default(config: Any, name: str) -> Any:
    """Return the default of a dataclass field, or None if there is no such field."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return fields.get(name)
