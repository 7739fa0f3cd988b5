"""A parser of HLO, XLA's text of a compiled program: its computations, their instructions and the instructions' shapes.

It reads what `jax.stages.Compiled.as_text()` returns for CPU, TPU and NVIDIA GPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_BITS = re.compile(r"^[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dimensions of an array, and whether it lies in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def num_bytes(self) -> int:
        """Size of the array without the padding of the device's tiling."""
        bits = _BITS.match(self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0  # a token has no size
        return math.ceil(math.prod(self.dims) * width / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program; `shapes` are those of its result, several if that is a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation in an attribute; None without it."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass
class Computation:
    """A function of a program: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next(i for i in self.instructions.values() if i.is_root)

    def parameter(self, number: int) -> Instruction:
        """Returns the parameter instruction of the argument with this number."""
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and i.literal == str(number))

    def shapes(self, name: str) -> tuple[Shape, ...]:
        """Returns the shapes of an instruction's result."""
        return self.instructions[name].shapes


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns (name → computation, name of the entry computation) of a program.

    Raises:
      ValueError: The text is no HLO module.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        header = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
        if header and " = " not in line:
            current = computations[header[2]] = Computation(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _instruction(line.strip())):
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"no HLO module: it has no ENTRY computation; it begins with {text[:60]!r}")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not opcode:
        return None
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop - 1]
    operands = () if opcode[1] in ("constant", "parameter", "iota") else tuple(_operands(inside))
    shapes = tuple(_shapes(rest[:end]))
    return Instruction(head[2], opcode[1], shapes, operands, rest[stop:], inside, bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        # S(0), or no S, means main memory; other numbers are scratch memories of the device.
        yield Shape(dtype, sizes, re.search(r"S\([1-9]", layout) is None)


def _operands(inside: str) -> Iterator[str]:
    """Yields the names of operands, each of which may follow its shape."""
    depth, item = 0, ""
    for character in inside + ",":
        depth += character in "({["
        depth -= character in ")}]"
        if character == "," and depth == 0:
            if item.strip():
                yield item.split()[-1].lstrip("%")
            item = ""
        else:
            item += character
