"""`str-kernels export`: the merged model is the adapted one, or nothing is written."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModelForCausalLM, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_tokenizer import chat_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.files.atomic import MARKER
from str_kernels.integrations import export as exporting
from str_kernels.integrations.export import export
from str_kernels.integrations.loading.models import load_model

# of PEFT, of tied models: what is held here
pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) .*tie_word_embeddings:UserWarning")
IDS = torch.arange(3, 20)[None]
LINEAR = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make_run(folder, rng, config=None, tied=False, dtype=torch.float32, size=0.3):
    """Write a base and an adapter that has moved; return the adapter's folder and its logits."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
    sizes = {
        "vocab_size": len(chat_tokenizer()), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    ends = {"tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **ends))
    base.generation_config.temperature = 0.7
    base.generation_config.do_sample = True
    base.to(dtype).save_pretrained(folder / "base")
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "base")
    model, _ = load_model(str(folder / "base"))
    model = get_peft_model(model, copy.deepcopy(config) or LoraConfig(**LINEAR)).float().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=size, generator=rng)
    model.save_pretrained(folder / "run", save_embedding_layers=False)
    return folder / "run", logits_of(model)


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def run(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["export", *map(str, arguments)])


def test_the_folder_is_a_model_that_transformers_reads(tmp_path, rng):
    folder, expected = make_run(tmp_path, rng)
    result = run(folder, "--output", tmp_path / "model", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["base"] == "base" and said["dtype"] == "float32" and not said["untied"]
    assert said["adapter_effect"] > 0.1
    assert max(said["merge_difference"], said["written_difference"]) < 1e-5

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert said["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert model.generation_config.temperature == 0.7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.pad_token is None  # as in the base, not as batches need it
    assert tokenizer.chat_template == chat_tokenizer().chat_template
    texts = (path for path in (tmp_path / "model").iterdir() if path.suffix in (".json", ".jinja"))
    assert not any(str(tmp_path) in path.read_text() for path in texts)
    assert json.loads((tmp_path / "model" / MARKER).read_text())["kind"] == "model"
    load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**{**LINEAR, "use_rslora": True}),
        LoraConfig(**{**LINEAR, "use_dora": True}),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["rslora", "dora", "saved", "tokens", "ia3"],
)
def test_other_adapters(tmp_path, rng, config, tied):
    folder, expected = make_run(tmp_path, rng, config, tied)
    result = export(str(folder), tmp_path / "model")
    assert result.untied == (tied and bool(getattr(config, "modules_to_save", None)))
    got = logits_of(load_model(str(tmp_path / "model"))[0])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("layers", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_lora_on_a_tied_weight_is_merged_once(tmp_path, rng, layers, tying):
    config = LoraConfig(r=2, target_modules=layers, ensure_weight_tying=tying)
    folder, expected = make_run(tmp_path, rng, config, tied=True)
    result = export(str(folder), tmp_path / "model")
    assert result.untied and result.written_difference < 1e-4 < result.adapter_effect
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_model_whose_layers_alone_were_trained_stays_tied(tmp_path, rng):
    folder, _ = make_run(tmp_path, rng, tied=True)
    assert not export(str(folder), tmp_path / "model").untied
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_weights_are_rounded_once_and_what_that_takes_is_said(tmp_path, rng):
    folder, expected = make_run(tmp_path, rng, dtype=torch.bfloat16, size=0.003)
    rounded = run(folder, "--output", tmp_path / "rounded")
    assert rounded.exit_code == 0 and "more than a tenth" in rounded.output
    stored = load_file(tmp_path / "rounded" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    base = load_file(tmp_path / "base" / "model.safetensors")
    apart = sum(not torch.equal(stored[name], weight) for name, weight in base.items())
    assert 0 < apart < len(base)  # norms and embeddings are as they were

    whole = run(folder, "--output", tmp_path / "whole", "--dtype", "float32")
    assert whole.exit_code == 0 and "more than a tenth" not in whole.output
    model, _ = load_model(str(tmp_path / "whole"))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_merge_is_told_and_writes_nothing(tmp_path, rng, monkeypatch):
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    folder, _ = make_run(tmp_path, rng, config, tied=True)
    monkeypatch.setattr(exporting, "_untie", lambda model: None)
    with pytest.raises(ValueError, match="whose merge is exact; logits of the merged model are up"):
        export(str(folder), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_what_is_written_is_read_back(tmp_path, rng, monkeypatch):
    folder, _ = make_run(tmp_path, rng)
    save = LlamaForCausalLM.save_pretrained

    def save_another(self, *args, **kwargs):
        self.model.norm.weight.data[0] += 1
        save(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_another)
    with pytest.raises(ValueError, match="logits of the written model"):
        export(str(folder), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_outputs_are_replaced_only_where_this_command_made_them(tmp_path, rng, monkeypatch):
    folder, _ = make_run(tmp_path, rng)
    export(str(folder), tmp_path / "model")
    assert "must not exist unless" in run(folder, "--output", tmp_path / "model").output
    assert run(folder, "--output", tmp_path / "model", "--overwrite").exit_code == 0
    monkeypatch.setattr(exporting, "load_parts", None)  # refused before anything is loaded
    for output, message in (
        (folder, "made by this command"),
        (tmp_path, "must not be|made by this command"),
        (tmp_path / "run" / "adapter_config.json", "got the file"),
        (tmp_path / "run" / "adapter_config.json" / "model", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            export(str(folder), output, overwrite=True)
    assert (folder / "adapter_config.json").is_file()


def test_a_base_is_not_replaced_by_what_is_made_of_it(tmp_path, rng):
    folder, _ = make_run(tmp_path, rng)
    (tmp_path / "base" / MARKER).write_text('{"kind": "model"}')
    with pytest.raises(ValueError, match="`output` must not be the base of the adapter"):
        export(str(folder), tmp_path / "base", overwrite=True)


def test_what_cannot_be_merged_is_refused(tmp_path, rng):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    folder, _ = make_run(tmp_path, rng, config)
    with pytest.raises(ValueError, match="got virtual tokens"):
        export(str(folder), tmp_path / "model")
    for given in (tmp_path / "base", tmp_path / "none"):
        result = run(given, "--output", tmp_path / "model")
        assert result.exit_code == 2 and "must be a folder with an adapter" in result.output
    result = run(folder, "--output", tmp_path / "model", "--dtype", "int8")
    assert result.exit_code == 2 and "dtype` must be one of auto, float32" in result.output


def test_an_adapter_that_was_trained_as_a_causal_lm_is_one(tmp_path, rng):
    folder, _ = make_run(tmp_path, rng)
    assert isinstance(load_model(str(folder))[0], PeftModelForCausalLM)


def test_help_names_every_option():
    shown = run("--help").output
    assert all(option in shown for option in ("--output", "--dtype", "--overwrite", "--json"))
