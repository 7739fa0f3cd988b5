"""How each verb moves: one trajectory for both the picture and the sound, so that the two are synchronous.

Positions are relative to the work place (the spot on the table where the object lies), x to the right, y downwards, in units
of 1.5 picture heights, the scale at which `scene.py` draws the work. `Pose.speed` in [0, 1] drives continuous sounds;
`contacts` returns the moments of impact.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Pose:
    """Where hands, object and tool are at n times; every field is an array [n].

    Attributes:
      right_x, right_y: Position of the right hand.
      left_x, left_y: Position of the left hand.
      object_x, object_y: Position of the object; (0, 0) is the work place.
      angle: Object's rotation, radians.
      tool_angle: Tool's rotation, radians.
      gap: How far the object's parts are apart (an opened lid, a torn sheet), 0 to 1; folding takes it to -1.
      speed: How fast the surfaces rub or the liquid runs, 0 to 1.
    """

    right_x: np.ndarray
    right_y: np.ndarray
    left_x: np.ndarray
    left_y: np.ndarray
    object_x: np.ndarray
    object_y: np.ndarray
    angle: np.ndarray
    tool_angle: np.ndarray
    gap: np.ndarray
    speed: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Course:
    """How far an action has got at each of the times `u`; every array is [n].

    Attributes:
      u: Seconds since the action began.
      duration_s: Length of the action.
      on: 1 while it is under way, 0 outside of it, with ramps of 80 ms.
      cycle: Phase of a movement that repeats, radians.
      progress: Progress of a single movement early in the action, from 0 to 1.
      size: `amplitude` of `pose`.
    """

    u: np.ndarray
    duration_s: float
    on: np.ndarray
    cycle: np.ndarray
    progress: np.ndarray
    size: float


def _smooth(x):
    """Returns a smooth step that rises from 0 at x = 0 to 1 at x = 1."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def pose(motion: str, u: np.ndarray, duration_s: float, rate_hz: float, amplitude: float, phase: float) -> Pose:
    """Returns the pose at `u` seconds after the action began.

    Args:
      motion: Name of the motion, `taxonomy.Verb.motion`.
      u: Times since the action's start, seconds [n]; outside [0, duration_s] the hands rest.
      duration_s: Length of the action, seconds.
      rate_hz: Repetitions per second.
      amplitude: Size of the movement relative to the verb's usual one, about 0.8 to 1.2.
      phase: Phase of the cycle at the start of the action, radians.

    Raises:
      ValueError: Unknown motion.
    """
    u = np.asarray(u, np.float64)
    on = _smooth(u / 0.08) * _smooth((duration_s - u) / 0.08)
    cycle = 2.0 * np.pi * rate_hz * u + phase
    course = _Course(u, duration_s, on, cycle, _smooth((u - 0.15 * duration_s) / (0.5 / rate_hz)), amplitude)
    moved = _work_on_object(motion, course) or _move_object(motion, course) or _move_parts(motion, course)
    if not moved:
        raise ValueError(f"unknown motion {motion!r}; known are those of taxonomy.VERBS")
    fields = {field.name: 0.0 for field in dataclasses.fields(Pose)}
    fields |= {"right_x": 0.16, "right_y": 0.02, "left_x": -0.18, "left_y": 0.05} | moved  # hands at rest, except what moves
    return Pose(**{name: np.broadcast_to(value, u.shape) for name, value in fields.items()})


def _work_on_object(motion: str, c: _Course) -> dict:
    """Returns the fields of `Pose` that change if a hand works on an object that lies still; {} for other motions."""
    on, cycle, size = c.on, c.cycle, c.size
    match motion:
        case "circle":
            return {
                "right_x": 0.05 + 0.10 * size * np.cos(cycle) * on, "right_y": -0.04 + 0.07 * size * np.sin(cycle) * on,
                "tool_angle": 0.35 * np.cos(cycle) * on, "speed": on * (0.75 + 0.25 * np.sin(cycle)),
            }  # fmt: skip
        case "strike":
            raised = np.abs(np.sin(cycle / 2.0))
            return {"right_x": 0.04, "right_y": -0.05 - 0.17 * size * raised * on, "tool_angle": -0.7 * raised * on,
                    "speed": 0.3 * on}  # fmt: skip
        case "tap":
            return {"right_x": 0.04, "right_y": -0.05 - 0.07 * size * np.abs(np.sin(cycle / 2.0)) * on, "speed": 0.3 * on}
        case "sweep":
            return {"right_x": 0.24 * size * np.sin(cycle) * on, "right_y": -0.03, "speed": on * np.abs(np.cos(cycle))}
        case "rub":
            return {
                "right_x": 0.06 + 0.055 * size * np.sin(cycle) * on, "right_y": -0.03 + 0.02 * np.sin(cycle) * on,
                "left_x": -0.10, "speed": on * np.abs(np.cos(cycle)),
            }  # fmt: skip
        case "scrape":
            saw = np.mod(cycle / (2 * np.pi), 1.0)
            stroke = np.where(saw < 0.7, saw / 0.7, (1.0 - saw) / 0.3)
            pressed = np.sqrt(np.maximum(np.sin(np.pi * saw / 0.7), 0.0))
            return {"right_x": 0.02, "right_y": (-0.16 + 0.24 * stroke) * size * on, "tool_angle": 0.5,
                    "speed": on * np.where(saw < 0.7, pressed, 0.15)}  # fmt: skip
        case "touch":
            near = np.exp(-(((c.u - 0.4 * c.duration_s) / 0.28) ** 2))
            return {"right_x": 0.22 - 0.20 * near, "right_y": 0.12 - 0.13 * size * near, "left_x": -0.34, "left_y": 0.25,
                    "speed": on * near}  # fmt: skip
    return {}


def _move_object(motion: str, c: _Course) -> dict:
    """Returns the fields of `Pose` that change if the hands carry or turn the object; {} for other motions."""
    on, cycle, size = c.on, c.cycle, c.size
    match motion:
        case "shake":
            wave = np.sin(cycle) * on
            y = -0.16 + 0.09 * size * wave
            return {
                "object_x": 0.03 * wave, "object_y": y, "right_x": 0.09 + 0.03 * wave, "right_y": y + 0.02, "left_x": -0.3,
                "left_y": 0.2, "angle": 0.35 * wave, "speed": on * np.abs(np.cos(cycle)),
            }  # fmt: skip
        case "turn":
            angle = 1.1 * size * np.sin(cycle) * on
            return {
                "right_x": 0.13 * np.cos(angle), "right_y": 0.13 * np.sin(angle) - 0.02, "left_x": -0.13 * np.cos(angle),
                "left_y": -0.13 * np.sin(angle) + 0.02, "angle": angle, "speed": on * np.abs(np.cos(cycle)),
            }  # fmt: skip
        case "lift" | "place":
            y = -0.30 * size * (c.progress if motion == "lift" else 1.0 - c.progress)
            return {"object_y": y, "right_x": 0.11, "right_y": y, "left_x": -0.11, "left_y": y + 0.01,
                    "speed": on * np.clip(4.0 * c.progress * (1.0 - c.progress), 0, 1)}  # fmt: skip
        case "drop":
            fall = np.clip((c.u - 0.25 * c.duration_s) / 0.22, 0.0, 1.0)
            return {"object_y": -0.40 * size * (1.0 - fall**2), "right_x": 0.10 + 0.10 * fall, "right_y": -0.40 * size - 0.02,
                    "angle": 0.8 * fall}  # fmt: skip
        case "pour":
            tilt = _smooth((c.u - 0.1 * c.duration_s) / 0.25) * _smooth((c.duration_s - c.u) / 0.25)
            y = -0.24 * size
            return {
                "object_x": -0.02, "object_y": y, "right_x": 0.09, "right_y": y + 0.01, "left_x": -0.24, "left_y": 0.10,
                "angle": 1.75 * tilt, "speed": np.clip((tilt - 0.5) * 2.0, 0.0, 1.0),
            }  # fmt: skip
        case "hold":
            y = -0.14 * size + 0.006 * np.sin(cycle)
            return {"object_y": y, "right_x": 0.08, "right_y": y + 0.02, "left_x": -0.08, "left_y": y + 0.02,
                    "speed": 0.35 * on * np.maximum(0.0, np.sin(0.7 * cycle)) ** 2}  # fmt: skip
    return {}


def _move_parts(motion: str, c: _Course) -> dict:
    """Returns the fields of `Pose` that change if parts of the object move apart or together; {} for other motions."""
    on, cycle, size = c.on, c.cycle, c.size
    match motion:
        case "open" | "close":
            gap = c.progress if motion == "open" else 1.0 - c.progress
            return {"right_x": 0.05 + 0.10 * gap, "right_y": -0.08 - 0.16 * size * gap, "gap": gap,
                    "speed": on * np.clip(4.0 * c.progress * (1.0 - c.progress), 0, 1)}  # fmt: skip
        case "fold":
            fold = 0.5 - 0.5 * np.cos(cycle)
            y = -0.07 * np.sin(np.pi * fold) * on
            return {
                "right_x": 0.20 - 0.16 * size * fold * on, "right_y": y, "left_x": -0.20 + 0.10 * size * fold * on,
                "left_y": y, "gap": -fold * on, "speed": on * np.abs(np.sin(cycle)),
            }  # fmt: skip
        case "tear":
            rip = np.mod(cycle / (2 * np.pi), 1.0)
            return {
                "right_x": 0.08 + 0.16 * size * rip * on, "right_y": -0.06 + 0.05 * rip,
                "left_x": -0.08 - 0.16 * size * rip * on, "left_y": -0.06 - 0.03 * rip, "gap": rip * on,
                "speed": on * np.where(rip < 0.8, 0.4 + 0.6 * rip, 0.0),
            }  # fmt: skip
    return {}


def contacts(
    motion: str, duration_s: float, rate_hz: float, amplitude: float, phase: float
) -> list[tuple[float, float]]:
    """Returns the impacts of an action as (seconds after its start, strength in (0, 1.3]), in order."""
    if motion in ("strike", "tap"):
        # The hand is down where |sin(cycle / 2)| is 0: where the cycle is a multiple of 2 pi.
        first = int(np.ceil(phase / (2 * np.pi)))
        hits = [(k - phase / (2 * np.pi)) / rate_hz for k in range(first, first + int(duration_s * rate_hz) + 2)]
        return [(t, amplitude) for t in hits if 0.05 < t < duration_s - 0.05]
    if motion in ("shake", "circle", "turn"):
        # At each turning point of the swing, things inside or below the object knock.
        turns = [((k + 0.5) * np.pi - phase) / (2 * np.pi * rate_hz) for k in range(int(4 * duration_s * rate_hz) + 8)]
        every = turns[::2] if motion != "shake" else turns
        return [(t, 0.7 * amplitude) for t in every if 0.05 < t < duration_s - 0.05]
    start, length = 0.15 * duration_s, 0.5 / rate_hz
    if motion == "open":
        return [(start + 0.02, 0.8 * amplitude), (start + 0.8 * length, 0.4 * amplitude)]
    if motion in ("close", "place"):
        return [(start + 0.86 * length, amplitude), (start + 0.86 * length + 0.07, 0.3 * amplitude)]
    if motion == "lift":
        return [(start + 0.05, 0.6 * amplitude)]
    if motion == "touch":
        return [(0.4 * duration_s - 0.05, 0.5 * amplitude)]
    if motion == "drop":
        hit = 0.25 * duration_s + 0.22
        return [(hit, amplitude), (hit + 0.16, 0.45 * amplitude), (hit + 0.26, 0.2 * amplitude)]
    return []
