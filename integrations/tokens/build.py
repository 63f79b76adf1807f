"""`str-kernels tokens build`: choose safety tokens in one of several ways, and write a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...evals import read_prompt_rows
from ...files import Watcher
from ...loss_memory import cpu_dtype
from ...tokens import SafetyTokens
from ..chat import encode_examples, read_examples
from ..loading import load_model, load_tokenizer
from .builders import from_contrast, from_refusals
from .opening_tokens import from_openings

ANCHORS = "anchors"
_NO_LIMIT = 2**31  # maximum length of a corpus row, tokens
# The options of each way of choosing; any other option is an error.
_OPTIONS: dict[str, set[str]] = {
    "templates": {"templates", "positions"},
    "refusals": {"harmful", "count", "positions", "batch_size"},
    "contrast": {"harmful", "harmless", "count", "positions", "batch_size"},
    "openings": {"harmful", "harmless", "templates", "count", "batch_size"},
    "random": {"count", "seed", "like", "corpus"},
}


def build_tokens(
    model_name: str,
    way: str,
    output: Path,
    *,
    overwrite: bool = False,
    dtype: str = "auto",
    watch: Watcher | None = None,
    **options: Any,
) -> SafetyTokens:
    """Choose safety tokens and write them to a file.

    Args:
        model_name: "builtin", a folder or a hub id; for "templates" and "random" only its
            tokenizer is loaded.
        way: "templates", "refusals", "contrast", "openings" or "random".
        output: the JSON file to write; its folder is made if missing.
        overwrite: replace `output` if it exists.
        dtype: of the model; "auto" is as stored, or float32 on a CPU that is slow in bfloat16.
        watch: called with a stage's name, the amount done and the total.
        **options: those of the command; None means the default of the chosen way.

    Returns:
        The tokens, as written to the file.

    Raises:
        ValueError: the input is bad, or the model refuses too little; nothing has been written.
    """
    if way not in _OPTIONS:
        raise ValueError(f"`--from` must be one of {', '.join(_OPTIONS)}; got {way!r}")
    given = {name: value for name, value in options.items() if value is not None}
    known = _OPTIONS[way]
    for name in given:
        if name not in known:
            ways = " or ".join(way for way, names in _OPTIONS.items() if name in names)
            raise ValueError(f"`{name}` must come with --from {ways}; got --from {way}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise ValueError(f"`output` must not exist unless overwrite is set; got {output}")

    def say(text: str) -> None:
        if watch is not None:
            watch(text, 0, 1)

    if way == "templates":
        tokens = SafetyTokens.from_templates(
            load_tokenizer(model_name, progress=say),
            given.get("templates"),
            tokens_per_template=given.get("positions"),
        )
    elif way == "random":
        tokens = _random(load_tokenizer(model_name, progress=say), **given)
    else:
        prompts = {  # before anything slow
            kind: [
                row.prompt for row in read_prompt_rows(kind, given.pop(kind, ANCHORS), kind=kind)
            ]
            for kind in ("harmful", "harmless")
            if kind in known
        }
        on_cpu = not torch.accelerator.is_available()
        if dtype == "auto" and on_cpu and cpu_dtype() == torch.float32:
            dtype = "float32"  # bfloat16 would take minutes here
        model, tokenizer = load_model(model_name, dtype=dtype, progress=say)
        if way == "openings":
            beside = SafetyTokens.from_templates(tokenizer, given.pop("templates", None))
            both = prompts["harmful"] + prompts["harmless"]
            tokens = from_openings(model, tokenizer, both, beside=beside, **given)
        elif way == "refusals":
            tokens = from_refusals(model, tokenizer, prompts["harmful"], **given, watch=watch)
        else:
            tokens = from_contrast(
                model, tokenizer, prompts["harmful"], prompts["harmless"], **given, watch=watch
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    tokens.save(output)
    return tokens


def _random(
    tokenizer: Any,
    count: int | None = None,
    seed: int = 0,
    like: Path | None = None,
    corpus: Path | None = None,
) -> SafetyTokens:
    if count is None and like is None:
        raise ValueError(
            "`count` must say how many tokens to draw, unless `like` does; got neither"
        )
    rows = None
    if corpus is not None:
        examples = read_examples(corpus)
        rows = [row["input_ids"] for row in encode_examples(tokenizer, examples, _NO_LIMIT)]
    return SafetyTokens.random(
        tokenizer,
        count,
        seed=seed,
        like=None if like is None else SafetyTokens.load(like, tokenizer),
        corpus=rows,
    )
