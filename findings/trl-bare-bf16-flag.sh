#!/usr/bin/env bash
# Expected: `--bf16` switches bfloat16 on in TRL's commands, as `--fp16` does float16 and as `--bf16`
# does in a script with transformers' own TrainingArguments.
# Really: TRL makes the field `bool | None`, so that None can mean "unless fp16", and the parser
# gives a flag without a value to plain bools alone: `--bf16` ends with "expected one argument", and
# only `--bf16 true` is taken.
# Seen with trl 1.16.0 and transformers 5.24.0 (torch 2.13.0) on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "trl==1.16.0" "transformers==5.24.0" 2>/dev/null
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PYTHON' 2>/dev/null
import contextlib
import io
import sys

import transformers
import trl
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig, TrlParser

found = {}
for name, parser, flags in (
    ("TRL, --fp16", TrlParser(SFTConfig), ["--fp16"]),
    ("TRL, --bf16", TrlParser(SFTConfig), ["--bf16"]),
    ("TRL, --bf16 true", TrlParser(SFTConfig), ["--bf16", "true"]),
    ("transformers, --bf16", HfArgumentParser(TrainingArguments), ["--bf16"]),
):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args_into_dataclasses(["--output_dir", sys.argv[1], "--use_cpu", *flags])
        found[name] = "taken"
    except SystemExit:
        found[name] = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    print(name, "->", found[name])
print("trl", trl.__version__, "transformers", transformers.__version__)
assert found.pop("TRL, --bf16") == "argument --bf16: expected one argument", "taken bare now"
assert set(found.values()) == {"taken"}, found
PYTHON
