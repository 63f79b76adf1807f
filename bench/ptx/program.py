"""Parse a PTX module into instructions. Anything unknown is an error and never skipped."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple


class Unsupported(NotImplementedError):
    """The program contains something that the executor does not know."""


class Register(NamedTuple):
    """A register by name, without its %."""

    name: str


class Special(NamedTuple):
    """A register that the hardware fills, such as tid.x."""

    name: str


class Symbol(NamedTuple):
    """A name of the module: a parameter, a label or the shared memory."""

    name: str
    offset: int = 0


class Number(NamedTuple):
    """An integer, or the bits of a float of `floats` bits (0 for an integer)."""

    value: int
    floats: int = 0


class Address(NamedTuple):
    """An operand in brackets."""

    base: Register | Symbol
    offset: int


class Vector(NamedTuple):
    """An operand in braces; None is _, which takes no value."""

    parts: tuple[Register | Number | None, ...]


Operand = Register | Special | Symbol | Number | Address | Vector


class Instruction(NamedTuple):
    """One instruction and the line of Triton source that it was compiled from."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None = None
    negated: bool = False
    line: int = 0

    def __str__(self) -> str:
        return f"{self.opcode} (line {self.line})"


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        name: of the kernel.
        params: name and type of each parameter, in order.
        threads: of a block.
        code: the instructions.
        labels: the position of each label in `code`.
        bits: the width of the registers of each prefix, 1 for predicates.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    threads: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    bits: dict[str, int]

    def width(self, register: Register) -> int:
        """Return the bits of a register."""
        return self.bits[register.name.rstrip("0123456789")]

    def without(self, pc: int) -> Program:
        """Return the program without one instruction; the others keep their positions."""
        code = list(self.code)
        code[pc] = Instruction("nop", (), line=code[pc].line)
        return replace(self, code=tuple(code))


# Outside the kernel are the version, the shared memory, and constants that nothing may point to.
_OUTSIDE = re.compile(
    r"\.(version|target|address_size|file|section)\b|\.extern \.shared\b.*\bglobal_smem\[\];"
    r"|\.global \.align \d+ \.b8 [\w$]+\[\d+\]( = \{[^}]*\})?;"
)
_HEADER = re.compile(
    r"\.(visible|weak)? ?\.entry\s+(?P<name>[\w$]+)\s*\((?P<params>.*?)\)(?P<limits>.*?)\{", re.S
)
_PARAM = re.compile(r"\.param \.(\w+)(?: \.ptr(?: \.\w+)?(?: \.align \d+)?)? ([\w$]+)")
_REGISTERS = re.compile(r"\.reg \.(pred|[busf](?:8|16|32|64))\s+%(\w+?)<\d+>;")
_INSTRUCTION = re.compile(r"(?:@(!?)%(\w+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*;", re.S)


def parse(text: str) -> Program:
    """Parse the one kernel of a PTX module."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = "\n".join(line.split("//")[0].rstrip() for line in text.splitlines())
    text = text.split("\n\t.section")[0]  # the rest is for debuggers
    headers = list(_HEADER.finditer(text))
    if len(headers) != 1:
        raise Unsupported(f"{len(headers)} kernels in a module")
    header = headers[0]
    body, end = _body(text[header.end() :])
    outside = text[: header.start()] + "\n" + text[header.end() + end :]
    for line in filter(None, map(str.strip, outside.splitlines())):
        if not _OUTSIDE.match(line):
            raise Unsupported(f"outside the kernel: {line}")
    bits: dict[str, int] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    line = 0
    for statement in _statements(body):
        if statement.startswith(".loc"):
            # a function that was inlined has the lines of its callers too: the outermost
            at = re.findall(r"\.loc\s+\d+ (\d+)|inlined_at \d+ (\d+)", statement)
            line = int("".join(at[-1])) or line
        elif statement.startswith(".reg"):
            match = _REGISTERS.fullmatch(statement)
            if match is None or match[2] in bits:
                raise Unsupported(statement)
            bits[match[2]] = 1 if match[1] == "pred" else int(match[1][1:])
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif not re.fullmatch(r'\.pragma "nounroll";', statement):
            code.append(_instruction(statement, line))
    params = tuple(_param(text) for text in header["params"].split(",") if text.strip())
    return Program(header["name"], params, _threads(header["limits"]), tuple(code), labels, bits)


def _body(text: str) -> tuple[str, int]:
    """Return the text before the brace that ends the kernel, and the brace's position."""
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return text[: match.start()], match.end()
    raise Unsupported("a kernel without an end")


def _statements(body: str) -> list[str]:
    """Split a body at semicolons, labels and the ends of lines that begin with .loc."""
    found = []
    rest = ""
    for line in body.splitlines():
        if not rest and line.strip().startswith(".loc"):
            found.append(line.strip())
            continue
        rest = f"{rest} {line}".strip()
        while match := re.match(r"[\w$]+:|[^;]*;", rest):
            found.append(match[0])
            rest = rest[match.end() :].strip()
    if rest:
        raise Unsupported(rest)
    return found


def _param(text: str) -> tuple[str, str]:
    match = _PARAM.fullmatch(" ".join(text.split()))
    if match is None:
        raise Unsupported(text.strip())
    return match[2], match[1]


def _threads(limits: str) -> int:
    """Return the threads of a block; a cluster of blocks is not executed."""
    threads = 0
    for limit in filter(None, map(str.strip, limits.split("\n"))):
        match = re.fullmatch(r"\.(\w+) (\d+)(?:, 1, 1)?", limit)
        if match is None or match[1] not in ("reqntid", "maxnreg", "minnctapersm"):
            raise Unsupported(limit)
        if match[1] == "reqntid":
            threads = int(match[2])
    if threads % 32 or not threads:
        raise Unsupported(f"{threads} threads in a block")
    return threads


def _instruction(statement: str, line: int) -> Instruction:
    match = _INSTRUCTION.fullmatch(statement)
    if match is None:
        raise Unsupported(statement)
    negated, predicate, opcode, rest = match.groups()
    operands = tuple(_operand(part) for part in _split(rest))
    return Instruction(opcode, operands, predicate, bool(negated), line)


def _split(text: str) -> list[str]:
    parts = re.split(r",(?![^{\[]*[}\]])", text) if text.strip() else []
    return [part.strip() for part in parts]


def _operand(text: str) -> Operand:
    if match := re.fullmatch(r"\{(.*)\}", text, re.S):
        return Vector(tuple(_part(part) for part in _split(match[1])))
    if match := re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text):
        base = _operand(match[1])
        if isinstance(base, Register | Symbol):
            return Address(base, int(match[2] or 0))
    if match := re.fullmatch(r"%([a-z]+\d+)", text):
        return Register(match[1])
    if match := re.fullmatch(r"%([a-z]+(?:\.[xyz])?)", text):
        return Special(match[1])
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Number(int(match[1] or match[2], 16), 32 if match[1] else 64)
    if match := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        return Number(int(match[1], 0))
    if match := re.fullmatch(r"([A-Za-z$][\w$]*)(?:\+(\d+))?", text):
        return Symbol(match[1], int(match[2] or 0))
    raise Unsupported(f"operand {text}")


def _part(text: str) -> Register | Number | None:
    if text == "_":
        return None
    part = _operand(text)
    if not isinstance(part, Register | Number):
        raise Unsupported(f"operand {text} in braces")
    return part
