#!/usr/bin/env bash
# Expected: `--lora_target_modules q_proj` of TRL's commands adapts every q_proj, as
# `--lora_target_modules q_proj v_proj` adapts every q_proj and v_proj.
# Really: one name alone fails. TRL's ModelConfig takes a list of one out of its list, so that
# "all-linear" and patterns can be given, and PEFT matches a string as a pattern against a module's
# whole path, where it matches a list against the ends of paths.
# Seen with trl 1.16.0, peft 0.21.2, transformers 5.24.0 and torch 2.13.0 on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "trl==1.16.0" "peft==0.21.2" \
  "transformers==5.24.0" 2>/dev/null
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import peft
import trl
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, TrlParser, get_peft_config

tiny = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1,
)
found = {}
for names in (["q_proj", "v_proj"], ["q_proj"]):
    given = ["--use_peft", "--lora_target_modules", *names]
    (options,) = TrlParser(ModelConfig).parse_args_and_config(given)
    try:
        model = get_peft_model(LlamaForCausalLM(tiny), get_peft_config(options))
        adapted = sum(name.endswith("lora_A.default") for name, _ in model.named_modules())
        found[len(names)] = f"{adapted} adapted"
    except ValueError as error:
        found[len(names)] = str(error).split(".")[0]
    print(names, "->", repr(options.lora_target_modules), "->", found[len(names)])
print("trl", trl.__version__, "peft", peft.__version__)
assert found[2] == "2 adapted", found
assert found[1] == "Target modules q_proj not found in the base model", "one name works now"
PYTHON
