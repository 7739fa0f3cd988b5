"""How often the loops of a compiled program go round."""

import dataclasses
import math
import re

from mc3_jax.hlo_text import Computation, Instruction


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
