"""str-kernels doctor."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor import examine
from .console import JSON_OPTION, print_json


def doctor(as_json: JSON_OPTION = False) -> None:
    """Show versions and devices, and run a tiny loss on every backend against eager.

    Exits with 1 if a backend that can run gives a wrong result.
    """
    found = examine()
    checks = [check for device in found["devices"] for check in device["backends"]]
    healthy = all(check["status"] != "wrong" for check in checks)
    if as_json:
        print_json({**found, "healthy": healthy})
    else:
        _show_doctor(found)
    if not healthy:
        raise typer.Exit(1)


def _show_doctor(found: dict[str, Any]) -> None:
    console = Console()
    console.print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    table = Table("device", "auto picks", "backend", "status", "detail")
    for device in found["devices"]:
        for check in device["backends"]:
            colour = {"ok": "green", "wrong": "red"}.get(check["status"], "yellow")
            table.add_row(
                device["device"],
                device["auto"],
                check["backend"],
                f"[{colour}]{check['status']}[/]",
                escape(check["detail"]),
            )
    console.print(table)
