"""`str-kernels export`: merge an adapter into its base, as a model that other tools can read."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import check_output, replacing_folder
from .anchors import read_prompts
from .chat import render_prompts
from .loading import (
    adapter_folder,
    check_adapter_files,
    load_model,
    load_parts,
    load_tokenizer,
    put_adapter,
)
from .models import adapters_off, base_of, is_prompt_learning

MARKER = "model"  # marks the folder's kind, see check_output
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROMPTS = 4
# Tolerance, relative to the largest logit: float32 sums in another order differ by less, even in
# deep models. An update merged twice, or not at all, is off by as much as the adapter does.
_FLOAT32 = 1e-3


@dataclass(frozen=True)
class ExportResult:
    """The exported model, and how far its logits are from those with the adapter.

    Args:
        folder: the model's folder.
        base: the name of the base model.
        dtype: of the written weights.
        parameters: number of parameters.
        untied: embedding and head no longer share a weight, since the adapter made them differ.
        prompts: number of prompts on which the logits were compared, in float32.
        adapter_effect: largest difference between the base with and without the adapter, logits.
        merge_difference: largest difference between the model with the adapter and the merged
            model, before its weights are rounded.
        written_difference: the same for the model as read back from the folder.
    """

    folder: Path
    base: str
    dtype: str
    parameters: int
    untied: bool
    prompts: int
    adapter_effect: float
    merge_difference: float
    written_difference: float

    @property
    def rounded_away(self) -> bool:
        """Whether rounding the weights costs a tenth of the adapter's effect or more."""
        return self.written_difference > max(0.1 * self.adapter_effect, self.merge_difference)


def export(
    run: str,
    output: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Merge an adapter into its base and write a full model.

    The folder holds safetensors, config, generation config and tokenizer. It is written under a
    temporary name, and renamed after its logits were compared, so it is either whole or absent.

    Args:
        run: a folder with an adapter, as written by finetune, or a hub id.
        output: the folder to write.
        dtype: of the written weights; "auto" keeps the dtype of each weight in the base.
        overwrite: replace `output` if it is a model made by this function.
        progress: called with a line of text before anything that takes seconds.

    Returns:
        What was written, with the largest differences of the logits.

    Raises:
        ValueError: there is no adapter that can be merged, or the merge changed the logits;
            nothing has been written.

    Notes:
        The merge is computed in float32 and rounded once. If embedding and head share one weight,
        LoRA on either makes them differ, and PEFT 0.21 would add both updates to the shared weight.
        So they are untied first, and the model grows by one head. An adapter that was trained on
        quantised weights is merged into the base as it is stored.
    """
    say = progress or (lambda text: None)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of auto, {', '.join(_DTYPES)}; got {dtype!r}")
    adapter = adapter_folder(run)
    if adapter is None:
        raise ValueError(f"`run` must be a folder with an adapter; got {run!r} without one")
    check_adapter_files("run", adapter)
    check_output(output, overwrite, marker=MARKER, inputs=[adapter])
    tokenizer = load_tokenizer(run, progress=progress)  # unchanged: load_parts may set the padding
    parts = load_parts(run, progress=progress)
    if Path(parts.name).is_dir() and Path(parts.name).resolve() == output.resolve():
        raise ValueError(f"`output` must not be the base of the adapter; got {output}")
    if getattr(parts.model, "is_quantized", False):
        raise ValueError(
            f"`run` must be an adapter of a model that is not quantised; {parts.name} is"
        )
    tied = _is_tied(parts.model)
    dtypes = {name: weight.dtype for name, weight in parts.model.named_parameters()}
    model = put_adapter("run", parts.model.float(), adapter)
    if is_prompt_learning(model):
        raise ValueError("`run` must have its adapter in the layers; got virtual tokens")
    prompts = _encoded_prompts(tokenizer)

    say("logits of the adapter")
    wanted = _logits(model, prompts)
    with adapters_off(model):
        effect = _difference(_logits(model, prompts), wanted)
    say("merge")
    _untie(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied weights; the logits are compared below
            merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"`run` must have an adapter that can be merged: {error}") from error
    bound = _FLOAT32 * max(float(one.abs().max()) for one in wanted)
    merge_difference = _difference(_logits(merged, prompts), wanted)
    _check_difference("merged", merge_difference, bound)
    _round(merged, dtypes, dtype)
    base = Path(parts.name).name if Path(parts.name).is_dir() else parts.name
    written = str(merged.dtype).removeprefix("torch.")
    untied = tied and not _is_tied(merged)
    parameters = sum(weight.numel() for weight in merged.parameters())
    in_float32 = all(weight.dtype == torch.float32 for weight in merged.parameters())
    with replacing_folder(output, marker=MARKER) as folder:
        say("write")
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model, merged, parts  # to have only one model in memory
        gc.collect()
        say("read it back and compare")
        found, _ = load_model(str(folder))
        written_difference = _difference(_logits(found.float(), prompts), wanted)
        _check_difference("written", written_difference, bound if in_float32 else torch.inf)
    return ExportResult(
        output,
        base,
        written,
        parameters,
        untied,
        len(prompts),
        effect,
        merge_difference,
        written_difference,
    )


def _encoded_prompts(tokenizer: Any) -> list[list[int]]:
    prompts = read_prompts("default")[:_PROMPTS]
    if tokenizer.chat_template:
        texts = render_prompts(tokenizer, prompts)
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [tokenizer.encode(text) for text in prompts]


def _logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids], device=model.device)).logits.float().cpu()
            for ids in prompts
        ]


def _difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference of any logit; NaN if one is NaN."""
    apart = [(a - b).abs().max() for a, b in zip(got, wanted, strict=True)]
    return float(torch.stack(apart).max())


def _check_difference(what: str, difference: float, bound: float) -> None:
    if not difference <= bound:
        raise ValueError(
            f"`run` must be an adapter whose merge is exact; logits of the {what} model are up to "
            f"{difference:.3g} from the adapter's, where rounding explains {bound:.3g}"
        )


def _is_tied(model: Any) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return getattr(head, "weight", None) is embedding.weight


def _untie(model: Any) -> None:
    """Give the head its own weight if an adapter has a layer on it or on the embedding."""
    inner: Any = base_of(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if not any(hasattr(end, "base_layer") for end in ends):
        return
    embedding, head = (getattr(end, "base_layer", end) for end in ends)
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    inner.config.get_text_config(decoder=True).tie_word_embeddings = False
    inner.config.tie_word_embeddings = False


def _round(model: Any, dtypes: dict[str, torch.dtype], dtype: str) -> None:
    """Convert each weight to the requested dtype, or to the one it had in the base."""
    for name, weight in model.named_parameters():
        wanted = dtypes.get(name, model.config.dtype) if dtype == "auto" else _DTYPES[dtype]
        weight.data = weight.data.to(wanted)
    model.config.dtype = model.dtype
