"""Numbers of iterations of the loops of a compiled program."""

import dataclasses
import math
import re

from mc3_jax.hlo_text import Computation, Instruction


def trip_count(computations: dict, computation: Computation, loop: Instruction) -> int | None:
    """Returns a `while`'s number of iterations, as noted by the compiler or from its counter's limit; None if unknown."""
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
    """Finds where the values of a computation come from: through copies, and from inside a fusion to what is outside."""

    computation: Computation
    outside: "_Values | None" = None
    passed: dict[str, str] = dataclasses.field(default_factory=dict)  # a fusion's parameter -> the operand's name outside

    def source(self, name: str) -> tuple["_Values", Instruction]:
        """Returns the computation and the instruction that a value comes from."""
        if name in self.passed:
            return self.outside.source(self.passed[name])
        made = self.computation.instructions[name]
        return self.source(made.operands[0]) if made.opcode in ("bitcast", "convert", "copy", "opt-barrier") else (self, made)

    def entered(self, computations: dict, name: str) -> tuple["_Values", Instruction]:
        """Returns as `source`; for a fusion, the instruction inside it that makes its result."""
        where, made = self.source(name)
        if made.opcode != "fusion":
            return where, made
        called = computations[made.called("calls")]
        passed = {called.parameter(i).name: operand for i, operand in enumerate(made.operands)}
        return _Values(called, where, passed).source(called.root.name)

    def constant(self, name: str) -> int | None:
        """Returns a value if it is a constant whole number, otherwise None."""
        _, made = self.source(name)
        return int(made.literal) if made.opcode == "constant" and re.fullmatch(r"-?\d+", made.literal) else None

    def place(self, name: str) -> int | None:
        """Returns a value's index in the tuple that it is an element of, or None if it is no such element."""
        _, made = self.source(name)
        found = re.search(r"\bindex=(\d+)", made.attributes)
        return int(found[1]) if made.opcode == "get-tuple-element" and found else None


def _comparison(computations: dict, condition: Computation) -> tuple[int, int, bool] | None:
    """Returns (index of the counter in the loop's state, its constant limit, whether that is included), None if unknown."""
    where, compare = _Values(condition).entered(computations, condition.root.name)
    direction = re.search(r"direction=(LT|LE)", compare.attributes)
    if compare.opcode != "compare" or not direction:
        return None
    place, limit = where.place(compare.operands[0]), where.constant(compare.operands[1])
    return None if place is None or limit is None else (place, limit, direction[1] == "LE")


def _element(computation: Computation, name: str, place: int) -> int | None:
    """Returns an element of a tuple if it is a constant, otherwise None."""
    where, made = _Values(computation).source(name)
    return where.constant(made.operands[place]) if made.opcode == "tuple" else None


def _step(computations: dict, body: Computation, place: int) -> int | None:
    """Returns what a loop's body adds to an element of its state if that is a constant, otherwise None."""
    if body.root.opcode != "tuple":
        return None
    where, add = _Values(body).entered(computations, body.root.operands[place])
    if add.opcode != "add":
        return None
    return next((where.constant(b) for a, b in (add.operands, add.operands[::-1]) if where.place(a) == place), None)
