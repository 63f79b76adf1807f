#!/usr/bin/env bash
# Expected: datasets.load_dataset("json", ...) keeps a JSON string as a string, since JSON says what is
# one: a column of answers such as "2024-01-02" trains on these letters.
# Really: where every string of the column reads as a date, the column becomes a timestamp, and a row
# holds a datetime. One answer that is no date, and the whole column is text.
# Seen with datasets 5.2.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "datasets==5.2.0" 2>/dev/null
cd "$work"
HF_HUB_OFFLINE=1 HF_HOME="$work/home" "$work/venv/bin/python" - <<'PYTHON'
import datetime
import json
from pathlib import Path

import datasets

datasets.disable_progress_bars()


def loaded(*answers):
    file = Path(f"{len(answers)}.jsonl")
    file.write_text("".join(json.dumps({"answer": text}) + "\n" for text in answers))
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    return str(rows.features["answer"].dtype), rows[0]["answer"]


dates = loaded("2024-01-02", "2024-01-03")
mixed = loaded("2024-01-02", "2024-01-03", "no date")
print(datasets.__version__, dates, mixed)
if dates != ("timestamp[s]", datetime.datetime(2024, 1, 2)) or mixed[1] != "2024-01-02":
    raise SystemExit("changed: the strings were read otherwise")
PYTHON
