"""Models that are not whole, adapters as models, and what a tokenizer and a row may hold."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MptConfig,
    OPTConfig,
    RobertaConfig,
)

from str_kernels import SafetyTokens, attach
from str_kernels.integrations.evaluation.inputs import NamedModel
from str_kernels.integrations.loading import models as loading
from str_kernels.integrations.loading.models import load_model, load_tokenizer, longest_row
from str_kernels.integrations.tokens.build import build_tokens

VOCABULARY = len(chat_tokenizer())
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model", 3)


@pytest.fixture
def adapter(model, tmp_path, rng):
    """An adapter that has moved, in a folder without a tokenizer, and its logits."""
    peft_model = get_peft_model(
        load_model(str(model))[0], LoraConfig(r=2, target_modules="all-linear")
    ).eval()
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=rng)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits_of(peft_model)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


def edit(folder, change, file="model.safetensors"):
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def test_a_whole_model_is_loaded(model):
    found, tokenizer = load_model(str(model))
    expected = AutoModelForCausalLM.from_pretrained(model)
    torch.testing.assert_close(logits_of(found), logits_of(expected), rtol=0, atol=0)
    assert tokenizer.pad_token == "<pad>" and not found.training


@pytest.mark.parametrize("count", [1, 3, 5])
def test_missing_weights_are_named(model, count):
    names = sorted(load_file(model / "model.safetensors"))[-count:]
    edit(model, lambda weights: [weights.pop(name) for name in names])
    with pytest.raises(ValueError, match=f"must have all its weights; .* lacks {count}") as told:
        load_model(str(model))
    assert ", ".join(names[:3]) in str(told.value)
    assert str(told.value).endswith("and 2 more") == (count == 5)


def test_a_tied_head_and_a_buffer_are_not_missing(tmp_path, monkeypatch):
    def saved(name, made):
        made.save_pretrained(tmp_path / name)
        chat_tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    tied = LlamaModel(LlamaConfig(**SMALL, tie_word_embeddings=True))
    load_model(saved("tied", tied))
    untied = LlamaModel(LlamaConfig(**SMALL, tie_word_embeddings=False))
    with pytest.raises(ValueError, match=r"lacks 1, which would be random: lm_head\.weight"):
        load_model(saved("untied", untied))

    init = LlamaForCausalLM.__init__

    def with_buffer(self, config):
        init(self, config)
        self.register_buffer("steps", torch.zeros(1))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    load_model(str(tmp_path / "tied"))


def test_other_sizes_are_named(model):
    def cut(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()

    edit(model, cut)
    with pytest.raises(
        ValueError, match=r"sizes .*: model\.norm\.weight \(\(31,\) in the file, \(32,\) by"
    ):
        load_model(str(model))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_pointers_of_git_lfs_are_named(model, file):
    (model / file).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file} is a pointer of Git LFS") as told:
        load_model(str(model))
    assert "\n" not in str(told.value)


def test_a_pointer_that_nothing_reads_is_no_fault(model):
    (model / "pytorch_model.bin").write_text(POINTER)
    load_model(str(model))


def test_files_cut_anywhere_are_named(model, rng):
    whole = (model / "model.safetensors").read_bytes()
    places = torch.randint(len(whole), (4,), generator=rng).tolist()
    for length in (0, 3, 9, len(whole) - 1, *places):
        (model / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
            load_model(str(model))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{}", '{"model', "[]", "\0"])
def test_other_damage_is_one_line(model, file, content):
    (model / file).write_text(content)
    with pytest.raises(ValueError, match="`model` must be 'builtin', a folder or a hub id") as told:
        load_model(str(model))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["./modle", "../modle", "{}/modle", "runs/of/modle"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_mistyped_folder_is_named_as_one(tmp_path, name, load):
    name = name.format(tmp_path)
    with pytest.raises(ValueError, match=r"got .*modle': there is no such folder$"):
        load(name)


def test_a_name_that_may_be_a_hub_id_is_looked_for_in_both_places(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="got 'runs/modle': no folder here, nor on the hub: "):
        load_model("runs/modle")


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_an_adapter_is_a_model_and_goes_on(adapter, own_tokenizer):
    folder, expected = adapter
    if own_tokenizer:
        tokenizer = chat_tokenizer()
        tokenizer.chat_template += " "
        tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(str(folder))
    assert isinstance(model, PeftModel) and not model.training
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert tokenizer.chat_template.endswith(" ") == own_tokenizer
    assert load_tokenizer(str(folder)).chat_template == tokenizer.chat_template

    tokens = SafetyTokens.from_templates(tokenizer)
    with attach(model.train(), tokens, reference="start", tokenizer=tokenizer) as handle:
        batch = {"input_ids": torch.arange(3, 12)[None], "labels": torch.arange(3, 12)[None]}
        model(**batch).loss.backward()
        assert handle.last_anchors.penalty < 1e-9


def test_an_adapter_goes_where_its_base_goes(adapter, tmp_path, monkeypatch):
    folder, expected = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "model").resolve())
    shutil.move(tmp_path / "model", folder / "base")
    with pytest.raises(ValueError, match=r"an adapter whose base can be loaded; .* names .*model"):
        load_model(str(folder))

    def name_base(name):
        config["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(config))

    name_base("base")
    torch.testing.assert_close(logits_of(load_model(str(folder))[0]), expected, rtol=0, atol=0)
    monkeypatch.setattr(loading, "builtin_model_folder", lambda progress: folder / "base")
    name_base("/another/machine/smollm2-135m-instruct-0123456789ab-v3")
    torch.testing.assert_close(logits_of(load_model(str(folder))[0]), expected, rtol=0, atol=0)
    for nobody in (None, "", 3):
        name_base(nobody)
        with pytest.raises(ValueError, match="must name its base"):
            load_model(str(folder))
    name_base(str(folder))
    with pytest.raises(ValueError, match="which is an adapter itself"):
        load_model(str(folder))


def test_adapters_that_are_not_whole(adapter, tmp_path):
    folder, _ = adapter
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    name = sorted(load_file(file))[0]
    edit(folder, lambda weights: weights.pop(name), file.name)
    with pytest.raises(ValueError, match=f"of .*{name} is not in its file"):
        load_model(str(folder))
    file.write_bytes(whole)
    edit(folder, lambda weights: weights.update(more=torch.ones(1)), file.name)
    with pytest.raises(ValueError, match="more is of no layer here"):
        load_model(str(folder))
    file.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file.name} is a pointer of Git LFS"):
        load_model(str(folder))
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        load_model(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=rf"`model` must be a folder with .* no {file.name}"):
        load_model(str(folder))
    (folder / "adapter_config.json").write_text("{")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"must have a readable .*adapter_config\.json"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (
            LoraConfig(r=2, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
            {"save_embedding_layers": True},
        ),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), {}),
    ],
    ids=["moved embeddings", "virtual tokens"],
)
def test_other_adapters_make_a_model_too(model, tmp_path, config, options):
    made = get_peft_model(load_model(str(model))[0], config).eval()
    made.save_pretrained(tmp_path / "adapter", **options)
    found, _ = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(found), logits_of(made), rtol=0, atol=0)


def test_an_evaluation_of_an_adapter_is_that_of_its_base_with_it(model, adapter):
    folder, expected = adapter
    alone = NamedModel.load(str(folder), None, "auto")
    beside = NamedModel.load(str(model), folder, "auto")
    assert (alone.described, alone.adapter) == (beside.described, beside.adapter)
    torch.testing.assert_close(logits_of(alone.model), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be a full model beside `adapter`"):
        NamedModel.load(str(folder), folder, "auto")


def test_tokens_take_an_adapter_s_tokenizer(adapter, tmp_path):
    assert len(build_tokens(str(adapter[0]), "templates", tmp_path / "tokens.json"))


def save_with(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_padding_lies_inside_the_embedding(model):
    said = []
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    _, found = load_model(save_with(tokenizer, model), progress=said.append)
    assert found.pad_token == "<end>"
    assert said == [
        f"padding is '<end>': token {VOCABULARY} is outside of the model's {VOCABULARY}"
    ]
    tokenizer.add_special_tokens({"eos_token": "<new end>", "unk_token": "<unk>"})
    assert load_model(save_with(tokenizer, model))[1].pad_token == "<unk>"
    tokenizer.add_special_tokens({"unk_token": "<new unk>"})
    with pytest.raises(ValueError, match=f"among its {VOCABULARY} embeddings; .* {VOCABULARY + 1}"):
        load_model(save_with(tokenizer, model))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(**SMALL, max_position_embeddings=48), 48),
        (GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=1, n_head=2), 24),
        (OPTConfig(**{**SMALL, "max_position_embeddings": 20}, ffn_dim=48), 20),
        (MptConfig(vocab_size=40, d_model=32, n_heads=2, n_layers=1, max_seq_len=18), 18),
        (RobertaConfig(**SMALL, max_position_embeddings=23, pad_token_id=2, is_decoder=True), 20),
        (BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_longest_row_is_the_last_that_a_table_of_positions_takes(config, limit):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert longest_row(model) == limit
    ids = torch.full((1, (limit or 64) + 1), 5)
    model(input_ids=ids[:, :-1])
    if config.model_type in ("gpt2", "opt", "roberta"):
        with pytest.raises((IndexError, RuntimeError), match=r"index .*out of"):
            model(input_ids=ids)


def test_the_longest_row_of_an_adapted_model_is_that_of_its_base(model):
    base = load_model(str(model))[0]
    assert longest_row(get_peft_model(base, LoraConfig(target_modules="all-linear"))) == 64
