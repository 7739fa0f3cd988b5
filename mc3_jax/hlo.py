"""What a compiled program does, counted from XLA's text of it: FLOPs, bytes of memory and bytes of collectives.

XLA's own cost analysis counts the body of a loop once, however often it runs; here it counts as often as the loop goes round.
Counts are for one device of an SPMD program. Formats are those of `jax.stages.Compiled.as_text()` for CPU, TPU and
NVIDIA GPU; the meaning of instructions is that of https://openxla.org/xla/operation_semantics.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Instructions that name memory and move none of it.
_FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "tuple",
}  # fmt: skip
_SLICES = ("dynamic-slice", "gather", "slice")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_BITS = re.compile(r"^[a-z]+(\d+)")
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\d_x-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type, dimensions, and whether it lies in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def num_bytes(self) -> int:
        """Its size; padding by the device's tiling is not in it."""
        bits = _BITS.match(self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0  # a token has no size
        return math.ceil(math.prod(self.dims) * width / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program; `shapes` are those of its result, several where that is a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the computation an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass
class Computation:
    """A function of a program: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.is_root)

    def parameter(self, number: int) -> Instruction:
        """Returns the instruction that stands for an argument."""
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and i.literal == str(number))

    def shapes(self, name: str) -> tuple[Shape, ...]:
        """Returns the shapes of an instruction's result."""
        return self.instructions[name].shapes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective of a program.

    Attributes:
      kind: One of `COLLECTIVES`.
      dtype: Of what is exchanged; the largest part's, where there are several.
      num_bytes: Payload on one device: what goes into an all-reduce, a reduce-scatter, an all-to-all or a permute, what
        comes out of an all-gather.
      group_size: Devices that exchange with each other.
      times: How often it runs.
    """

    kind: str
    dtype: str
    num_bytes: int
    group_size: int
    times: int

    @property
    def wire_bytes(self) -> float:
        """Bytes a device sends in all if the exchange goes round a ring, which is the least it takes."""
        n = self.group_size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return share * self.num_bytes * self.times


@dataclasses.dataclass
class Counts:
    """What one device does in a run of the program.

    Attributes:
      flops: Of matrix products and convolutions, 2 for each multiply-add.
      memory_bytes: Read and written in main memory by instructions, each of which reads its inputs and writes its results;
        of a slice only what is sliced.
      exchanges: Collectives.
      unknown_loops: Loops whose number of rounds the program does not tell; their bodies count once.
    """

    flops: int = 0
    memory_bytes: int = 0
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Adds what another program does."""
        self.flops += other.flops
        self.memory_bytes += other.memory_bytes
        self.exchanges += other.exchanges
        self.unknown_loops += other.unknown_loops

    def payload(self, kind: str, dtype: str | None = None) -> int:
        """Returns the payload of all collectives of a kind, and of a type of numbers."""
        return sum(e.num_bytes * e.times for e in self.exchanges if e.kind == kind and dtype in (None, e.dtype))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a program by name, and the name of its entry.

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
    """Returns the position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        # S(0), or nothing, is main memory; others are the device's scratch memories.
        yield Shape(dtype, sizes, re.search(r"S\([1-9]", layout) is None)


def _operands(inside: str) -> Iterator[str]:
    """Yields the names of operands, which may stand behind their shapes."""
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


def count(text: str) -> Counts:
    """Returns what a program does, from its text."""
    computations, entry = parse(text)
    counts = Counts()
    _count(computations, computations[entry], 1, counts, top=True)
    return counts


def count_instruction(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> Counts:
    """Returns what an instruction outside of fusions does in one run.

    Args:
      computations: Of the program, see `parse`.
      computation: That it stands in.
      instruction: Of it.
    """
    counts = Counts()
    _count_one(computations, computation, instruction, 1, counts, top=True)
    return counts


def _count(computations: dict, computation: Computation, times: int, counts: Counts, *, top: bool) -> None:
    """Adds what a computation does, run `times` times.

    Args:
      computations: Of the program.
      computation: Of these.
      times: How often it runs.
      counts: Added to.
      top: Whether its instructions go through memory; those of a fusion don't.
    """
    carries_on = _carries_on(computation)
    for instruction in computation.instructions.values():
        _count_one(computations, computation, instruction, times, counts, top=top, carries_on=carries_on)


def _count_one(
    computations: dict, computation: Computation, instruction: Instruction, times: int, counts: Counts, *, top: bool,
    carries_on: bool = False,
) -> None:  # fmt: skip
    """Adds what an instruction does; `carries_on` as of its computation, the rest as of `_count`."""

    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if opcode == "while":
        rounds = trip_count(computations, computation, instruction)
        if rounds is None:
            counts.unknown_loops.append(instruction.name)
        _count(computations, computations[instruction.called("body")], times * (rounds or 1), counts, top=top)
        return
    if opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        either = [instruction.called(f"{case}_computation") for case in ("true", "false")]
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else either
        cases = [Counts() for _ in names]
        for name, case in zip(names, cases, strict=True):
            _count(computations, computations[name], times, case, top=top)
        counts.add(max(cases, key=lambda case: (case.flops, case.memory_bytes)))
        return
    if opcode in ("call", "async-start"):
        called = instruction.called("to_apply") or instruction.called("calls")
        _count(computations, computations[called], times, counts, top=top)
        return
    if kind in COLLECTIVES and not carries_on:
        counts.exchanges.append(_exchange(computation, instruction, kind, times))
    elif opcode == "dot":
        counts.flops += times * _dot_flops(computation, instruction)
    elif opcode == "custom-call":
        counts.flops += times * _library_flops(computation, instruction)
    elif opcode == "convolution":
        counts.flops += times * _convolution_flops(computation, instruction)
    elif opcode == "fusion":
        called = computations[instruction.called("calls")]
        if not _add_reduce_scatter(computation, instruction, called, times, counts):
            _count(computations, called, times, counts, top=False)
    if top and opcode not in _FREE and not opcode.endswith("-done"):
        counts.memory_bytes += times * _memory_bytes(computations, computation, instruction)


def _carries_on(computation: Computation) -> bool:
    """Returns whether a fusion goes on with, or waits for, a collective that another one has begun, as TPU programs do."""
    targets = " ".join(i.attributes for i in computation.instructions.values() if i.opcode == "custom-call")
    begun_before = computation.name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in targets
    return begun_before and "AsyncCollectiveStart" not in targets


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = computation.shapes(dot.operands[0])[0].dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = math.prod(left[int(d)] for d in found[1].split(",") if d) if found else 1
    return 2 * math.prod(dot.shapes[0].dims) * contracted


def _library_flops(computation: Computation, call: Instruction) -> int:
    """Returns the FLOPs of cuBLAS's matrix products and cuDNN's attention in a GPU program, 0 of another call."""
    target = _target(call)
    found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', call.attributes)
    if target.startswith("__cublas$") and found:
        left = computation.shapes(call.operands[0])[0].dims
        contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", found[1]))
        return 2 * math.prod(call.shapes[0].dims) * contracted
    if target.startswith("__cudnn$fmha"):
        scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', call.attributes)[1]
        width = computation.shapes(call.operands[0])[0].dims[-1]
        # Scores and sums of values; going back, scores once more, theirs and three gradients.
        products = 5 if target.endswith("Backward") else 2
        return 2 * products * math.prod(int(d) for d in re.findall(r"\d+", scores)) * width
    return 0


def _target(call: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    return found[1] if found else ""


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Returns its FLOPs without the products with padding and with holes, of which a TPU's batched matmuls are full."""
    kernel = computation.shapes(convolution.operands[1])[0].dims
    data = computation.shapes(convolution.operands[0])[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    window = dict(_WINDOW.findall(convolution.attributes))
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    spatial = sum(label.isdigit() for label in labels[1])
    size, stride, hole, kernel_hole = (
        [int(v) for v in window[key].split("x")] if key in window else [1] * spatial
        for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    pad = [[int(v) for v in p.split("_")] for p in window["pad"].split("x")] if "pad" in window else [[0, 0]] * spatial
    products = data[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    products *= kernel[labels[2].index("i")] * kernel[labels[2].index("o")]
    for d in range(spatial):
        length = data[labels[1].index(str(d))]
        products *= _valid_pairs(length, size[d], stride[d], pad[d][0], pad[d][1], hole[d], kernel_hole[d])
    return 2 * products


@functools.lru_cache
def _valid_pairs(length: int, size: int, stride: int, low: int, high: int, hole: int, kernel_hole: int) -> int:
    """Returns how many pairs of an output's and the kernel's position along one dimension meet a value of the input."""
    dilated, reach = (length - 1) * hole + 1, (size - 1) * kernel_hole + 1
    outputs = (dilated + low + high - reach) // stride + 1
    at = np.arange(outputs)[:, None] * stride + np.arange(size) * kernel_hole - low
    return int(np.sum((at >= 0) & (at < dilated) & (at % hole == 0)))


def _exchange(computation: Computation, instruction: Instruction, kind: str, times: int) -> Exchange:
    group_size = _group_size(instruction.attributes)
    shapes = [shape for name in instruction.operands for shape in computation.shapes(name)]
    num_bytes = sum(shape.num_bytes for shape in shapes) * (group_size if kind == "all-gather" else 1)
    return Exchange(kind, max(shapes, key=lambda s: s.num_bytes).dtype, num_bytes, group_size, times)


def _group_size(attributes: str) -> int:
    """Returns how many devices are in a group: of `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`; else 2."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # an axis, or `:(before)size`, a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return int(tiled[1]) if tiled else 2


def _add_reduce_scatter(
    computation: Computation, fusion: Instruction, called: Computation, times: int, counts: Counts
) -> bool:
    """Adds a TPU's reduce-scatter, a fusion of an all-reduce with the slice of its result; returns whether it was one."""
    inner = [i for i in called.instructions.values() if i.opcode == "all-reduce"]
    if not inner or "dynamic-slice" not in {i.opcode for i in called.instructions.values()}:
        return False
    counts.exchanges += [_exchange(called, i, "reduce-scatter", times) for i in inner]
    return True


def _memory_bytes(computations: dict, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes of main memory an instruction reads and writes."""
    operands = [computation.shapes(name) for name in instruction.operands]
    if instruction.opcode.removesuffix("-start") in _SLICES:
        # What begins a slice has its operands, what is sliced and a flag as its result.
        sliced = instruction.shapes[len(operands) if instruction.opcode.endswith("-start") else 0]
        return sliced.num_bytes * (operands[0][0].in_main_memory + sliced.in_main_memory)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[-1 if instruction.opcode == "scatter" else 1])
    if instruction.opcode != "fusion":
        # What begins a copy or an all-gather has its operands among its results.
        repeats = instruction.opcode.endswith("-start") and len(instruction.shapes) > len(operands)
        # cuBLAS and cuDNN are lent bytes to work in, which they rarely take.
        is_library = instruction.opcode == "custom-call" and _target(instruction).startswith(("__cublas$", "__cudnn$"))
        results = tuple(s for s in instruction.shapes if not (is_library and s.dtype in ("s8", "u8")))
        return (0 if repeats else sum(map(_main, operands))) + _main(results)
    called = computations[instruction.called("calls")]
    total = sum(_read_of(called, number, shapes) for number, shapes in enumerate(operands))
    return total + _written_by(called, called.root)


def _written_by(called: Computation, root: Instruction) -> int:
    """Returns the bytes a fusion writes: what is updated in place counts for the update alone."""
    if root.opcode == "tuple":
        return sum(_written_by(called, called.instructions[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written_by(called, called.instructions[root.operands[0]])
    return _main(called.shapes(root.operands[1]) if root.opcode == "dynamic-update-slice" else root.shapes)


def _read_of(fused: Computation, number: int, shapes: tuple[Shape, ...]) -> int:
    """Returns how much of an operand a fusion reads: the slices, where it takes nothing else of it."""
    name = fused.parameter(number).name
    users = [i for i in fused.instructions.values() if name in i.operands]
    if users and all(i.opcode in _SLICES and i.operands[0] == name for i in users):
        return min(_main(shapes), sum(_main(i.shapes) for i in users))
    if users and all(i.opcode == "dynamic-update-slice" and i.operands[0] == name for i in users):
        return 0
    return _main(shapes)


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.num_bytes for shape in shapes if shape.in_main_memory)


def trip_count(computations: dict, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a `while` goes round: as the compiler noted it, or of a counter up to a constant; None if unknown."""
    noted = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition, body = (computations[loop.called(part)] for part in ("condition", "body"))
    compared = _comparison(computations, condition)
    if compared is None:
        return None
    place, limit, inclusive = compared
    start = _element(computation, loop.operands[0], place)
    step = _step(computations, body, place)
    if start is None or not step or step < 0:
        return None
    return max(0, math.ceil((limit + inclusive - start) / step))


@dataclasses.dataclass
class _Values:
    """Looks at the values of a computation through copies, and from within a fusion at those outside."""

    computation: Computation
    outside: "_Values | None" = None
    passed: dict[str, str] = dataclasses.field(default_factory=dict)  # a fusion's parameter -> the operand's name outside

    def source(self, name: str) -> tuple["_Values", Instruction]:
        """Returns the instruction that made a value, and where it stands."""
        if name in self.passed:
            return self.outside.source(self.passed[name])
        made = self.computation.instructions[name]
        return self.source(made.operands[0]) if made.opcode in ("bitcast", "convert", "copy", "opt-barrier") else (self, made)

    def entered(self, computations: dict, name: str) -> tuple["_Values", Instruction]:
        """Returns the same, of a fusion the instruction within that makes its result."""
        where, made = self.source(name)
        if made.opcode != "fusion":
            return where, made
        called = computations[made.called("calls")]
        passed = {called.parameter(i).name: operand for i, operand in enumerate(made.operands)}
        return _Values(called, where, passed).source(called.root.name)

    def constant(self, name: str) -> int | None:
        """Returns a value that is a constant whole number, or None."""
        _, made = self.source(name)
        return int(made.literal) if made.opcode == "constant" and re.fullmatch(r"-?\d+", made.literal) else None

    def place(self, name: str) -> int | None:
        """Returns which element of a tuple a value is, or None."""
        _, made = self.source(name)
        found = re.search(r"\bindex=(\d+)", made.attributes)
        return int(found[1]) if made.opcode == "get-tuple-element" and found else None


def _comparison(computations: dict, condition: Computation) -> tuple[int, int, bool] | None:
    """Returns (which element of the loop's state counts, the constant it is compared with, whether that is included)."""
    where, compare = _Values(condition).entered(computations, condition.root.name)
    direction = re.search(r"direction=(LT|LE)", compare.attributes)
    if compare.opcode != "compare" or not direction:
        return None
    place, limit = where.place(compare.operands[0]), where.constant(compare.operands[1])
    return None if place is None or limit is None else (place, limit, direction[1] == "LE")


def _element(computation: Computation, name: str, place: int) -> int | None:
    """Returns an element of a tuple where it is a constant."""
    where, made = _Values(computation).source(name)
    return where.constant(made.operands[place]) if made.opcode == "tuple" else None


def _step(computations: dict, body: Computation, place: int) -> int | None:
    """Returns what a loop's body adds to an element of its state, where that is a constant."""
    if body.root.opcode != "tuple":
        return None
    where, add = _Values(body).entered(computations, body.root.operands[place])
    if add.opcode != "add":
        return None
    return next((where.constant(b) for a, b in (add.operands, add.operands[::-1]) if where.place(a) == place), None)
