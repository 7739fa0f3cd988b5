"""FLOPs, memory traffic and collectives of a compiled program, counted from its HLO text.

XLA's own cost analysis counts the body of a loop once, however often it runs; here it is counted once per iteration. Counts
are for one device of an SPMD program. The meaning of instructions is that of
https://openxla.org/xla/operation_semantics.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from mc3_jax import hlo_text
from mc3_jax.hlo_loops import trip_count
from mc3_jax.hlo_text import Computation, Instruction, Shape

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Instructions that refer to memory but move none of it.
_FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "tuple",
}  # fmt: skip
_SLICES = ("dynamic-slice", "gather", "slice")
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\d_x-]+)")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective of a program.

    Attributes:
      kind: One of `COLLECTIVES`.
      dtype: Element type of the payload; that of the largest array, if there are several.
      num_bytes: Payload on one device: the input of an all-reduce, a reduce-scatter, an all-to-all or a permute, the output
        of an all-gather.
      group_size: Number of devices that exchange with each other.
      times: How often it runs.
    """

    kind: str
    dtype: str
    num_bytes: int
    group_size: int
    times: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in total with a ring algorithm, which is the minimum."""
        n = self.group_size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return share * self.num_bytes * self.times


@dataclasses.dataclass
class Counts:
    """Work of one device in one run of the program.

    Attributes:
      flops: FLOPs of matrix products and convolutions, 2 for each multiply-add.
      memory_bytes: Bytes that instructions read from and write to main memory. Each reads its inputs and writes its results;
        a slice reads only what it takes.
      exchanges: Collectives.
      unknown_loops: Names of the loops whose number of iterations the program doesn't show; their bodies count once.
    """

    flops: int = 0
    memory_bytes: int = 0
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Adds the counts of another program or of a part of this one."""
        self.flops += other.flops
        self.memory_bytes += other.memory_bytes
        self.exchanges += other.exchanges
        self.unknown_loops += other.unknown_loops

    def payload(self, kind: str, dtype: str | None = None) -> int:
        """Returns the payload bytes of all collectives of a kind; with `dtype`, only of those with this element type."""
        return sum(e.num_bytes * e.times for e in self.exchanges if e.kind == kind and dtype in (None, e.dtype))


def count(text: str) -> Counts:
    """Returns the counts of a program, from its HLO text."""
    computations, entry = hlo_text.parse(text)
    counts = Counts()
    _count(computations, computations[entry], 1, counts, top=True)
    return counts


def count_instruction(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> Counts:
    """Returns the counts of one run of an instruction that is not part of a fusion.

    Args:
      computations: All computations of the program, see `hlo_text.parse`.
      computation: The one with the instruction.
      instruction: Instruction to count.
    """
    counts = Counts()
    _count_one(computations, computation, instruction, 1, counts, top=True)
    return counts


def _count(computations: dict, computation: Computation, times: int, counts: Counts, *, top: bool) -> None:
    """Adds the counts of `times` runs of a computation.

    Args:
      computations: All computations of the program.
      computation: The one to count.
      times: How often it runs.
      counts: Counts to add to.
      top: Whether its instructions read and write main memory; those inside a fusion don't.
    """
    carries_on = _carries_on(computation)
    for instruction in computation.instructions.values():
        _count_one(computations, computation, instruction, times, counts, top=top, carries_on=carries_on)


def _count_one(
    computations: dict, computation: Computation, instruction: Instruction, times: int, counts: Counts, *, top: bool,
    carries_on: bool = False,
) -> None:  # fmt: skip
    """Adds the counts of an instruction; `carries_on` is `_carries_on` of its computation, the rest is as for `_count`."""

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
    """Returns whether a fusion continues or awaits a collective that an earlier fusion started, as in TPU programs."""
    targets = " ".join(i.attributes for i in computation.instructions.values() if i.opcode == "custom-call")
    begun_before = computation.name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in targets
    return begun_before and "AsyncCollectiveStart" not in targets


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = computation.shapes(dot.operands[0])[0].dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = math.prod(left[int(d)] for d in found[1].split(",") if d) if found else 1
    return 2 * math.prod(dot.shapes[0].dims) * contracted


def _library_flops(computation: Computation, call: Instruction) -> int:
    """Returns the FLOPs of a call of cuBLAS's matrix products or cuDNN's attention in a GPU program; 0 for other calls."""
    target = _target(call)
    found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', call.attributes)
    if target.startswith("__cublas$") and found:
        left = computation.shapes(call.operands[0])[0].dims
        contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", found[1]))
        return 2 * math.prod(call.shapes[0].dims) * contracted
    if target.startswith("__cudnn$fmha"):
        scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', call.attributes)[1]
        width = computation.shapes(call.operands[0])[0].dims[-1]
        # Forward: scores and weighted sums of values. Backward: the scores again, their gradient, and those of q, k and v.
        products = 5 if target.endswith("Backward") else 2
        return 2 * products * math.prod(int(d) for d in re.findall(r"\d+", scores)) * width
    return 0


def _target(call: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    return found[1] if found else ""


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Returns the FLOPs without products with padding and dilation holes, of which TPUs' batched matmuls have many."""
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
    """Returns how many pairs of output and kernel position, along one dimension, fall on an actual value of the input."""
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
    """Returns the number of devices in a group, from `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`; else 2."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # a whole axis, or part of one as `:(before)size`
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return int(tiled[1]) if tiled else 2


def _add_reduce_scatter(
    computation: Computation, fusion: Instruction, called: Computation, times: int, counts: Counts
) -> bool:
    """Adds a TPU's reduce-scatter, which is a fusion of an all-reduce and a slice of its result; returns if it is one."""
    inner = [i for i in called.instructions.values() if i.opcode == "all-reduce"]
    if not inner or "dynamic-slice" not in {i.opcode for i in called.instructions.values()}:
        return False
    counts.exchanges += [_exchange(called, i, "reduce-scatter", times) for i in inner]
    return True


def _memory_bytes(computations: dict, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes of main memory that an instruction reads and writes."""
    operands = [computation.shapes(name) for name in instruction.operands]
    if instruction.opcode.removesuffix("-start") in _SLICES:
        # The result of an asynchronous slice's start is a tuple: its operands, the slice and a flag.
        sliced = instruction.shapes[len(operands) if instruction.opcode.endswith("-start") else 0]
        return sliced.num_bytes * (operands[0][0].in_main_memory + sliced.in_main_memory)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(operands[-1 if instruction.opcode == "scatter" else 1])
    if instruction.opcode != "fusion":
        # The start of an asynchronous copy or all-gather repeats its operands among its results.
        repeats = instruction.opcode.endswith("-start") and len(instruction.shapes) > len(operands)
        # The bytes among the results of cuBLAS and cuDNN are workspace, which they rarely use.
        is_library = instruction.opcode == "custom-call" and _target(instruction).startswith(("__cublas$", "__cudnn$"))
        results = tuple(s for s in instruction.shapes if not (is_library and s.dtype in ("s8", "u8")))
        return (0 if repeats else sum(map(_main, operands))) + _main(results)
    called = computations[instruction.called("calls")]
    total = sum(_read_of(called, number, shapes) for number, shapes in enumerate(operands))
    return total + _written_by(called, called.root)


def _written_by(called: Computation, root: Instruction) -> int:
    """Returns the bytes that a fusion writes; of an array that it updates in place, only the update counts."""
    if root.opcode == "tuple":
        return sum(_written_by(called, called.instructions[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written_by(called, called.instructions[root.operands[0]])
    return _main(called.shapes(root.operands[1]) if root.opcode == "dynamic-update-slice" else root.shapes)


def _read_of(fused: Computation, number: int, shapes: tuple[Shape, ...]) -> int:
    """Returns the bytes of an operand that a fusion reads: the slices if it takes no more, 0 if it only updates in place."""
    name = fused.parameter(number).name
    users = [i for i in fused.instructions.values() if name in i.operands]
    if users and all(i.opcode in _SLICES and i.operands[0] == name for i in users):
        return min(_main(shapes), sum(_main(i.shapes) for i in users))
    if users and all(i.opcode == "dynamic-update-slice" and i.operands[0] == name for i in users):
        return 0
    return _main(shapes)


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.num_bytes for shape in shapes if shape.in_main_memory)
