"""`python -m bench`: its commands, what they save, the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_runs import PNG, refused, run, run_apart

from bench.memory import growth, memory
from bench.results import append_rows, read_rows
from bench.steps.heads import HEADS, HeadShape

pytestmark = pytest.mark.usefixtures("clean_memory")


@pytest.fixture
def tiny(monkeypatch):
    """Give the first head a toy's sizes."""
    monkeypatch.setitem(HEADS, "smollm2", HeadShape(331, 16))


@pytest.mark.parametrize(
    "command", ["speed", "memory", "growth", "traffic", "execute", "figure", "plan", "longcontext"]
)
def test_every_command_has_help_and_json(command):
    assert "--json" in run(command, "--help")


def test_speed_saves_rows_and_the_figure_is_made_of_the_last(tiny, tmp_path):
    ours = ["speed", "--head", "smollm2", "--tokens", 20, "--ids", 3, "--rounds", 2]
    ours += ["--providers", "eager", "--providers", "ours (tr", "--providers", "two"]
    ours += ["--no-memory", "--save", "--results", tmp_path]
    first = json.loads(run(*ours, "--json"))
    shown = run(*ours)
    assert "two full logits" in shown and "absent, needs a GPU" in shown.replace("\n", " ")
    saved = read_rows(tmp_path / "speed.csv")
    assert len(saved) == 2 * len(first)
    assert saved[0]["provider"] == "eager" and saved[0]["head"] == "smollm2"
    figure = tmp_path / "bench.png"
    printed = run("figure", "--head", "smollm2", "--results", tmp_path, "--to", figure)
    assert printed.startswith("| provider | ms |") and "| bare products |" in printed
    assert "ours (triton)" not in printed  # it was not timed
    assert figure.read_bytes().startswith(PNG)


def test_the_figure_says_what_to_do_without_a_run(tmp_path):
    assert "speed.csv" in refused("figure", "--results", tmp_path)
    another = {"head": "another", "dtype": "bfloat16", "train_head": False}
    append_rows(tmp_path / "speed.csv", [another])
    said = refused("figure", "--results", tmp_path)
    assert "speed" in said and "--save" in said


@pytest.mark.parametrize(
    ("command", "options"),
    [
        *(("speed", ["--head", "gpt-9"]), ("speed", ["--dtype", "int8"])),
        *(("longcontext", ["--way", "theirs"]), ("longcontext", ["--allocator", "jemalloc"])),
        ("longcontext", ["--save", "--parts"]),
    ],
)
def test_unknown_names_are_refused(command, options):
    assert options[1] in refused(command, *options)


@pytest.mark.parametrize("command", ["compile", "sass", "execute"])
def test_an_interpreting_process_is_told_so(command, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in refused(command)


def test_rows_are_added_and_columns_too(tmp_path):
    path = tmp_path / "new" / "speed.csv"
    append_rows(path, [{"a": 1, "b": "x, y"}])
    append_rows(path, [{"a": 2, "c": "line\nbreak"}])
    assert read_rows(path) == [
        {"a": "1", "b": "x, y", "c": ""},
        {"a": "2", "b": "", "c": "line\nbreak"},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["speed.csv"]


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size is POSIX")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "speed.csv"
    append_rows(path, [{"a": "old"}])
    script = (
        "import pathlib, resource, signal, sys\n"
        "from bench.results import append_rows\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "append_rows(pathlib.Path(sys.argv[1]), [{'a': 'new' * 9999}])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=root, capture_output=True, text=True
    )
    assert done.returncode != 0 and "File too large" in done.stderr
    assert read_rows(path) == [{"a": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["speed.csv"]


def test_memory_reports_both_and_ours_alone(monkeypatch):
    peaks = {"eager": 1000.0, memory.OURS: 10.0}
    asked = []

    def peak(name, shape, count, *_):
        asked.append((name, count))
        return peaks[name] * count

    monkeypatch.setattr(memory, "peak_in_child", peak)
    monkeypatch.setattr(memory, "available_bytes", lambda: 16 * 100 * 300)
    rows = memory.measure(HeadShape(100, 4), [100, 400], long=[5000])
    assert [row["N"] for row in rows] == [100, 400, 5000]
    # 400 rows by hand do not fit, and nobody asked for 5,000
    assert [row["eager"] for row in rows] == [100_000, None, None]
    assert [row["ours"] for row in rows] == [1000, 4000, 50_000]
    assert rows[2]["eager_predicted"] == 16 * 5000 * 100
    assert ("eager", 400) not in asked and ("eager", 5000) not in asked


def test_growth_fits_and_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "peak_in_child", lambda *_, tokens, **__: 3 * tokens**2)
    sizes = {"N": (8, 16), "V": (64, 128), "D": (4, 8), "memory, N": (10, 100, 1000)}
    monkeypatch.setattr(growth, "_MIDDLE", {"N": 16, "V": 128, "D": 8})
    rows = growth.measure(sizes, 2)
    assert [(row["grows"], row["size"]) for row in rows] == [
        (what, size) for what, every in sizes.items() for size in every
    ]
    assert rows[-1]["value"] == 3 * 1000**2 - 1000 * 8 * 2  # without the gradient
    assert rows[-1]["off"] > 0.5  # a parabola is no line
    line = growth.fitted_line([10, 20, 40], [35, 65, 125])
    assert line == pytest.approx((5.0, 3.0, 0.0), abs=1e-9)
    growth.draw(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(PNG)


def test_traffic_counts_in_a_process_of_its_own():
    """Where nothing has imported triton yet, the command itself must switch the interpreter on."""
    said = run_apart("-m", "bench", "traffic", "--vocab", 500, "--ids", 3, "--json")
    rows = json.loads(said)
    assert rows[0]["op"] == "ours, logits path" and rows[0]["bytes"] > 4 * 500
