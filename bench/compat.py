"""Write the result of a test run on certain releases as a row of compat.csv, for noxfile.py.

`python -m bench.compat report.xml transformers peft` reads pytest's JUnit report.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

from .results import FOLDER, Row, append_rows, origin

PROTOCOL = (
    "pytest -m 'not slow' on tests/integrations (without test_support.py), tests/cli/test_cli.py "
    "and the doctests of str_kernels"
)


def row_of(report: Path, packages: Sequence[str]) -> Row:
    """Count a report's tests, and list the versions that they ran on.

    Args:
        report: what `pytest --junitxml` wrote.
        packages: installed distributions whose versions are recorded.

    Returns:
        Origin, versions, and the numbers of tests that passed, failed (errors are among them) and
        were skipped.
    """
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"`report` must hold a testsuite; got {report}")
    total, failures, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {
        **origin("cpu", PROTOCOL),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "passed": total - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(float(suite.attrib["time"])),
    }


if __name__ == "__main__":
    row = row_of(Path(sys.argv[1]), sys.argv[2:])
    append_rows(FOLDER / "compat.csv", [row])
    sys.exit(row["failed"] > 0)
