"""Options shared by the commands of `python -m bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")]
Save = Annotated[bool, typer.Option("--save", help="Add the rows to a CSV file in --results.")]
Results = Annotated[Path, typer.Option(help="The folder of the CSV files.")]
