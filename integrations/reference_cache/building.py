"""`str-kernels cache build`: make a reference cache of a data file, encoded as in `finetune`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from ...reference_cache import DATED, BuildReport, CachedReference, verify_cache
from ...tokens import SafetyTokens
from ..anchors import read_prompts
from ..chat import encode_examples, read_examples, render, render_answer_starts
from ..models import Positions, check_positions, chosen_penalty
from .fingerprint import model_fingerprint
from .reading import cache_model


def build_cache(
    model_name: str,
    data: Path | None,
    output: Path,
    *,
    positions: Positions = "none",
    kind: str | None = None,
    safety_tokens: Path | None = None,
    templates: Path | None = None,
    anchors: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    answer_start: str | None = None,
    max_length: int = 1024,
    model_dtype: str = "auto",
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> BuildReport:
    """Compute the reference's safety logits for all rows of a data file, and store them.

    Args:
        model_name: "builtin", a folder or a hub id, of the frozen aligned model.
        data: JSONL file, as for `finetune`; None with positions "none".
        output: the folder to make, or of an interrupted build to resume.
        positions: as in `attach`. With "none" only the anchors are stored, not the rows.
        kind: of the penalty that will be used; None means the default kind.
        safety_tokens: a file written by SafetyTokens.save; its tokenizer must be the model's.
        templates: a text file of refusal templates, instead of the built-in ones.
        anchors: prompts to cache, rendered up to where the answer begins: a JSONL file of
            {"prompt": ...}, or "default". None means "default" with positions "none".
        chat_template_kwargs: of the chat template, for the anchors.
        answer_start: the text between an anchor's prompt and its answer.
        max_length: maximum length of a row, tokens; longer rows lose their end. Must be the same
            in training.
        model_dtype: of the frozen weights; must be the same in training.
        progress: called with a line of text before anything that takes seconds.
        options: path, backend, on_tokens, dtype, rows_per_shard, batch_tokens, overwrite, as in
            `cache_model`.

    Returns:
        A report of what was computed.

    Raises:
        ValueError: the input is bad, or the folder holds something else.
        OSError: the disk is full; the same call resumes the build.
    """
    if safety_tokens is not None and templates is not None:
        raise ValueError("`templates` must not be given together with `safety_tokens`; got both")
    if max_length < 2:
        raise ValueError(f"`max_length` must be >= 2; got {max_length}")
    check_positions(positions)
    kind = chosen_penalty(positions, kind=kind).kind
    if positions == "none":
        if data is not None:
            raise ValueError(
                f"`data` must be left out with positions 'none', where nothing of the rows is "
                f"stored (pass --positions response to store them); got {data}"
            )
        examples = []
        anchors = "default" if anchors is None else anchors
    elif data is None:
        raise ValueError("`data` must be given unless `positions` is 'none'; got None")
    else:
        examples = read_examples(data)  # before anything slow
    prompts = [] if anchors is None else read_prompts(anchors)
    model, tokenizer = _load_full(model_name, dtype=model_dtype, progress=progress)
    if prompts and not tokenizer.chat_template:
        raise ValueError("`anchors` must be None for a tokenizer without chat template")
    if safety_tokens is not None:
        tokens = SafetyTokens.load(safety_tokens, tokenizer)
    else:
        tokens = SafetyTokens.from_templates(tokenizer, templates)
    encoded = encode_examples(tokenizer, examples, max_length) if examples else []
    rows = [list(row["input_ids"]) for row in encoded]
    dated = bool(prompts) and _has_date(tokenizer, chat_template_kwargs)
    dated = dated or (any(one.messages for one in examples) and _has_date(tokenizer, None))
    starts = render_answer_starts(
        tokenizer, prompts, chat_template_kwargs=chat_template_kwargs, answer_start=answer_start
    )
    for text in starts:
        rows.append(list(tokenizer.encode(text, add_special_tokens=False)))
    made_on = {DATED: date.today().isoformat()} if dated else {}
    return cache_model(model, rows, tokens, output, kind=kind, made_with=made_on, **options)


def verify_cache_of(
    folder: Path,
    model_name: str | None = None,
    *,
    model_dtype: str = "auto",
    on_shard: Callable[[int, int], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Read everything in a cache, and check that it is of a model's weights if one is named.

    Returns:
        One line for each fault.
    """
    broken = verify_cache(folder, on_shard)
    if model_name is None or broken:
        return broken
    model, _ = _load_full(model_name, dtype=model_dtype, progress=progress)
    try:
        CachedReference(folder).check_fingerprint(model_fingerprint(model))
    except ValueError as error:
        return [str(error)]
    return []


def _has_date(tokenizer: Any, options: dict[str, Any] | None) -> bool:
    """Tell whether the chat template writes today's date, as Llama 3.2's does."""
    asked, template = [{"role": "user", "content": "Hello"}], tokenizer.get_chat_template()
    found = set()
    for day in ("one day", "another"):  # a macro overrides transformers' function
        clock = f"{{%- macro strftime_now(format) -%}}{day}{{%- endmacro -%}}"
        found.add(
            render(tokenizer, asked, **{**(options or {}), "chat_template": clock + template})
        )
    return len(found) > 1


def _load_full(name: str, *, dtype: str, progress: Callable[[str], None] | None) -> tuple[Any, Any]:
    """Load a model, but refuse an adapter: a cache is of base weights, and checked against them."""
    # here, since attach() imports this folder to read caches, and needs no transformers
    from ..loading import adapter_folder, load_model

    if adapter_folder(name) is not None:
        raise ValueError(
            f"`model` must be a full model to be cached; got {name!r}, an adapter. Make one of it "
            "by str-kernels export, and train that"
        )
    try:
        return load_model(name, dtype=dtype, progress=progress)
    except ValueError as error:  # here `dtype` is that of the stored logits
        raise ValueError(str(error).replace("`dtype`", "`model_dtype`")) from error
