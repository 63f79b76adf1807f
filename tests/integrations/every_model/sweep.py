"""Judge every model type that transformers has, and write the verdicts to docs/support/models.csv.

Each type runs in a process of its own, with a limit on time and on memory, so that one that crashes
or hangs costs its row alone. Verdicts are kept as they come in a scratch file; a second run goes on
where the first was stopped, unless versions, seed or the code that is judged have changed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing as mp
import os
import platform
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TABLE = ROOT / "docs" / "support" / "models.csv"
COLUMNS = (
    "mapping", "model_type", "class", "linear", "logits", "image", "reason", "loss_error",
    "gradient_error", "transformers", "torch",
)  # fmt: skip
SECONDS = 120.0
MEMORY = 8 << 30  # bytes of address space: a tiny model needs less than one of them in RAM
LEAST_EXACT = 140
PRELOAD = (  # what every type needs
    "zoo", "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava",
    "str_kernels.integrations.attach.hook",
)  # fmt: skip
VERSIONS = {name: version(name).split("+")[0] for name in ("transformers", "torch")}

Key = tuple[str, str]  # mapping, model type
Row = dict[str, str]


def row_of(mapping: str, model_type: str, seed: int) -> Row:
    """Judge one type: on path="logits" too where "linear" refuses it, and with an image."""
    import zoo

    row = _blank(mapping, model_type, zoo.CLASSES[mapping][model_type])
    outcome = zoo.judge(model_type, seed, "linear", mapping)
    row["linear"], row["reason"] = outcome.kind, outcome.reason
    if outcome.kind == "refused":
        second = zoo.judge(model_type, seed, "logits", mapping)
        row["logits"] = second.kind
        if second.kind == "exact":
            outcome = second
        elif second.reason != outcome.reason:
            row["reason"] += f"; path='logits': {second.reason}"
    path = "logits" if row["logits"] else "linear"
    if outcome.kind == "exact" and model_type in zoo.PICTURES:
        seen = zoo.judge(model_type, seed, path, mapping, image=True)
        row["image"] = seen.kind
        if seen.kind != "exact":
            row["reason"] = "; ".join(filter(None, (row["reason"], f"image: {seen.reason}")))
        else:
            outcome = max(outcome, seen, key=lambda o: o.gradient_error or 0.0)
    if outcome.loss_error is not None and outcome.gradient_error is not None:
        row["loss_error"] = _short(outcome.loss_error)
        row["gradient_error"] = _short(outcome.gradient_error)
    return row


def _short(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _blank(mapping: str, model_type: str, name: str) -> Row:
    known = {"mapping": mapping, "model_type": model_type, "class": name, **VERSIONS}
    return {column: known.get(column, "") for column in COLUMNS}


def _child(results: Connection, mapping: str, model_type: str, seed: int) -> None:
    """Send one row; whatever a type prints is dropped."""
    import resource  # not on Windows, where test_zoo.py still reads this file

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results.send(row_of(mapping, model_type, seed))


def rows_of(keys: list[Key], classes: dict[str, dict[str, str]], seed: int, workers: int,
            seconds: float = SECONDS) -> Iterator[Row]:  # fmt: skip
    """Judge types, `workers` at a time, and yield the rows as they come."""
    context = mp.get_context("forkserver")  # imports once, then forks in 20 ms
    context.set_forkserver_preload(list(PRELOAD))
    path = (str(HERE), os.environ.get("PYTHONPATH"))  # Python 3.11's server looks at nothing else
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    waiting = list(reversed(keys))
    running: dict[Any, tuple[Key, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                key = waiting.pop()
                results, end = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(end, *key, seed), daemon=True)
                process.start()
                end.close()
                running[results] = (key, process, time.monotonic() + seconds)
            first = min(deadline for *_, deadline in running.values())
            ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
            late = [r for r, (*_, deadline) in running.items() if deadline <= time.monotonic()]
            for results in dict.fromkeys([*ready, *late]):
                key, process, _ = running.pop(results)
                row = _blank(*key, classes[key[0]][key[1]])
                row["linear"] = "not buildable"
                try:
                    if results in ready:
                        row = results.recv()
                    else:
                        row["reason"] = f"took longer than {seconds:g} s"
                except EOFError:
                    process.join()
                    row["reason"] = f"its process ended with exit code {process.exitcode}"
                results.close()
                process.kill()
                process.join()
                yield row
    finally:
        for _, process, _ in running.values():
            process.kill()


def fingerprint(seed: int) -> str:
    """Name what a verdict hangs on: versions, seed, the zoo and the package."""
    digest = hashlib.sha256(repr((VERSIONS, seed, platform.python_version())).encode())
    for folder in (HERE.glob("zoo*.py"), (ROOT / "integrations").rglob("*.py"),
                   (ROOT / "str_kernels").rglob("*.py"), [Path(__file__)]):  # fmt: skip
        for file in sorted(folder):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _known(scratch: Path) -> dict[Key, Row]:
    rows: dict[Key, Row] = {}
    if scratch.exists():
        for line in scratch.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the line that a killed run left half written
                continue
            rows[row["mapping"], row["model_type"]] = row
    return rows


def write_table(table: Path, rows: list[Row]) -> None:
    """Replace the table in one step: a reader sees the old one or the new one."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=table.parent, prefix=f".{table.name}.", newline="", delete=False
    ) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(file.name, 0o644)  # a temporary file's is 0600
    os.replace(file.name, table)


def counts_of(rows: list[Row]) -> dict[str, int]:
    """Count verdicts, a type's being that of the path that takes it."""
    counts = Counter(row["logits"] or row["linear"] for row in rows)
    counts["wrong"] = sum("wrong" in (r["linear"], r["logits"], r["image"]) for r in rows)
    return {kind: counts[kind] for kind in ("exact", "refused", "not buildable", "wrong")}


def main(
    types: Annotated[
        str, typer.Option(help="Only these model types, with commas between; no table is written.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the models and batches.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Types judged at a time.")] = 1,
    fresh: Annotated[bool, typer.Option(help="Judge again what an earlier run has.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON lines.")] = False,
    output: Annotated[
        Path, typer.Option(help="Where the table goes.", show_default=str(TABLE.relative_to(ROOT)))
    ] = TABLE,
) -> None:
    """Judge every model type of transformers and write the table of what attach() supports."""
    import zoo

    console = Console(stderr=True)
    every: list[Key] = [(mapping, t) for mapping, names in zoo.CLASSES.items() for t in names]
    asked = [name.strip() for name in types.split(",") if name.strip()]
    unknown = sorted(set(asked) - {model_type for _, model_type in every})
    if unknown:
        raise typer.BadParameter(f"transformers maps no {', '.join(unknown)}")
    keys = [key for key in every if not asked or key[1] in asked]

    scratch = Path(tempfile.gettempdir()) / f"str-kernels-sweep-{os.getuid()}"
    scratch.mkdir(mode=0o700, exist_ok=True)
    scratch /= f"{fingerprint(seed)}.jsonl"
    if fresh:
        scratch.unlink(missing_ok=True)
    known = _known(scratch)
    rows = {key: known[key] for key in keys if key in known}
    todo = [key for key in keys if key not in known]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*parts, console=console) as progress, scratch.open("a") as kept:
        task = progress.add_task("judging", total=len(keys), completed=len(rows))
        for row in rows_of(todo, zoo.CLASSES, seed, workers):
            rows[row["mapping"], row["model_type"]] = row
            kept.write(json.dumps(row) + "\n")
            kept.flush()
            progress.update(task, advance=1, description=row["model_type"][:24].ljust(24))
            if "wrong" in (row["linear"], row["logits"], row["image"]):
                console.print(f"[red]wrong[/] {row['model_type']}: {row['reason']}")
    ordered = [rows[key] for key in keys]
    if as_json:
        for row in ordered:
            print(json.dumps(row))
    elif asked:
        for row in ordered:
            shown = [row[name] for name in COLUMNS[:9] if row[name]]
            console.print(*shown, sep="  ", highlight=False, markup=False)
    counts = {
        mapping: counts_of([row for row in ordered if row["mapping"] == mapping])
        for mapping in zoo.CLASSES
    }
    for mapping, count in counts.items():
        console.print(f"{mapping}: {', '.join(f'{n} {kind}' for kind, n in count.items())}")
    if not asked:
        write_table(output, ordered)
        console.print(f"wrote {output}")
    few = not asked and counts["causal-lm"]["exact"] < LEAST_EXACT
    if few:
        console.print(f"fewer than {LEAST_EXACT} causal LMs are exact")
    raise typer.Exit(int(few or any(count["wrong"] for count in counts.values())))


if __name__ == "__main__":
    typer.run(main)
