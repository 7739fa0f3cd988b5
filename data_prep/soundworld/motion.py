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


def _smooth(x):
    """Returns a smooth step that rises from 0 at x = 0 to 1 at x = 1."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _active(u, duration_s):
    """Returns 1 during the action and 0 outside it, with ramps of 80 ms."""
    return _smooth(u / 0.08) * _smooth((duration_s - u) / 0.08)


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
    zero = np.zeros_like(u)
    p = Pose(zero + 0.16, zero + 0.02, zero - 0.18, zero + 0.05, *(zero.copy() for _ in range(6)))
    on = _active(u, duration_s)
    cycle = 2.0 * np.pi * rate_hz * u + phase
    progress = _smooth((u - 0.15 * duration_s) / (0.5 / rate_hz))  # of a single movement early in the action
    a = amplitude
    match motion:
        case "circle":
            p.right_x, p.right_y = 0.05 + 0.10 * a * np.cos(cycle) * on, -0.04 + 0.07 * a * np.sin(cycle) * on
            p.tool_angle = 0.35 * np.cos(cycle) * on
            p.speed = on * (0.75 + 0.25 * np.sin(cycle))
        case "strike" | "tap":
            height = (0.17 if motion == "strike" else 0.07) * a
            p.right_x, p.right_y = zero + 0.04, -0.05 - height * np.abs(np.sin(cycle / 2.0)) * on
            p.tool_angle = -0.7 * np.abs(np.sin(cycle / 2.0)) * on if motion == "strike" else zero
            p.speed = 0.3 * on
        case "sweep":
            p.right_x, p.right_y = 0.24 * a * np.sin(cycle) * on, -0.03 + zero
            p.speed = on * np.abs(np.cos(cycle))
        case "rub":
            p.right_x, p.right_y = 0.06 + 0.055 * a * np.sin(cycle) * on, -0.03 + 0.02 * np.sin(cycle) * on
            p.left_x = zero - 0.10
            p.speed = on * np.abs(np.cos(cycle))
        case "scrape":
            saw = np.mod(cycle / (2 * np.pi), 1.0)
            stroke = np.where(saw < 0.7, saw / 0.7, (1.0 - saw) / 0.3)
            p.right_x, p.right_y = 0.02 + zero, (-0.16 + 0.24 * stroke) * a * on
            p.tool_angle = 0.5 + zero
            p.speed = on * np.where(saw < 0.7, np.sqrt(np.maximum(np.sin(np.pi * saw / 0.7), 0.0)), 0.15)
        case "shake":
            wave = np.sin(cycle) * on
            p.object_x, p.object_y = 0.03 * wave, -0.16 + 0.09 * a * wave
            p.right_x, p.right_y, p.left_x, p.left_y = 0.09 + 0.03 * wave, p.object_y + 0.02, zero - 0.3, zero + 0.2
            p.angle = 0.35 * wave
            p.speed = on * np.abs(np.cos(cycle))
        case "open" | "close":
            p.gap = progress if motion == "open" else 1.0 - progress
            p.right_x, p.right_y = 0.05 + 0.10 * p.gap, -0.08 - 0.16 * a * p.gap
            p.angle = zero
            p.speed = on * np.clip(4.0 * progress * (1.0 - progress), 0, 1)
        case "turn":
            p.angle = 1.1 * a * np.sin(cycle) * on
            p.right_x, p.right_y = 0.13 * np.cos(p.angle), 0.13 * np.sin(p.angle) - 0.02
            p.left_x, p.left_y = -0.13 * np.cos(p.angle), -0.13 * np.sin(p.angle) + 0.02
            p.speed = on * np.abs(np.cos(cycle))
        case "lift" | "place":
            high = progress if motion == "lift" else 1.0 - progress
            p.object_y = -0.30 * a * high
            p.right_x, p.right_y, p.left_x, p.left_y = 0.11 + zero, p.object_y, -0.11 + zero, p.object_y + 0.01
            p.speed = on * np.clip(4.0 * progress * (1.0 - progress), 0, 1)
        case "drop":
            fall = np.clip((u - 0.25 * duration_s) / 0.22, 0.0, 1.0)
            p.object_y = -0.40 * a * (1.0 - fall**2)
            p.right_x, p.right_y = 0.10 + 0.10 * fall, zero - 0.40 * a - 0.02
            p.angle = 0.8 * fall
        case "pour":
            tilt = _smooth((u - 0.1 * duration_s) / 0.25) * _smooth((duration_s - u) / 0.25)
            p.angle = 1.75 * tilt
            p.object_x, p.object_y = zero - 0.02, zero - 0.24 * a
            p.right_x, p.right_y = zero + 0.09, p.object_y + 0.01
            p.left_x, p.left_y = zero - 0.24, zero + 0.10
            p.speed = np.clip((tilt - 0.5) * 2.0, 0.0, 1.0)
        case "fold":
            fold = 0.5 - 0.5 * np.cos(cycle)
            p.gap = -fold * on
            p.right_x, p.left_x = 0.20 - 0.16 * a * fold * on, -0.20 + 0.10 * a * fold * on
            p.right_y = p.left_y = -0.07 * np.sin(np.pi * fold) * on
            p.speed = on * np.abs(np.sin(cycle))
        case "tear":
            rip = np.mod(cycle / (2 * np.pi), 1.0)
            p.gap = rip * on
            p.right_x, p.left_x = 0.08 + 0.16 * a * rip * on, -0.08 - 0.16 * a * rip * on
            p.right_y, p.left_y = -0.06 + 0.05 * rip, -0.06 - 0.03 * rip
            p.speed = on * np.where(rip < 0.8, 0.4 + 0.6 * rip, 0.0)
        case "touch":
            near = np.exp(-(((u - 0.4 * duration_s) / 0.28) ** 2))
            p.right_x, p.right_y = 0.22 - 0.20 * near, 0.12 - 0.13 * a * near
            p.left_x, p.left_y = zero - 0.34, zero + 0.25
            p.speed = on * near
        case "hold":
            p.object_y = -0.14 * a + 0.006 * np.sin(cycle)
            p.right_x, p.right_y, p.left_x, p.left_y = zero + 0.08, p.object_y + 0.02, zero - 0.08, p.object_y + 0.02
            p.speed = 0.35 * on * np.maximum(0.0, np.sin(0.7 * cycle)) ** 2
        case _:
            raise ValueError(f"unknown motion {motion!r}; known are those of taxonomy.VERBS")
    return p


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
