"""Draws SoundWorld's things onto a picture: objects by shape, tools, hands, machines.

Coordinates are pixels of the picture. Sizes are proportional to `unit_px`: the picture's height for machines, 1.5 times that
for hands and tools, which are nearer. Everything is made of filled polygons, ellipses and thick lines, so that a frame takes
a fraction of a millisecond.
"""

import cv2
import numpy as np

Colour = tuple[int, int, int]
_SHIFT = 4  # cv2's fixed-point bits: positions are drawn to a sixteenth of a pixel
_ONE = 1 << _SHIFT


def shade(rgb, factor: float) -> Colour:
    """Returns a colour times `factor`: lighter above 1, darker below."""
    return tuple(int(min(max(c * factor, 0), 255)) for c in rgb)


def polygon(image: np.ndarray, points: np.ndarray, rgb: Colour) -> None:
    """Fills a polygon with the corners `points`, [n, 2] in px."""
    fixed = np.round(points * _ONE).astype(np.int32)
    cv2.fillPoly(image, [fixed], rgb, cv2.LINE_AA, _SHIFT)


def ellipse(image: np.ndarray, centre, axes, rgb: Colour, angle: float = 0.0) -> None:
    """Fills an ellipse; axes are its half axes in px, angle in radians."""
    middle = (int(round(centre[0] * _ONE)), int(round(centre[1] * _ONE)))
    half = (max(int(round(axes[0] * _ONE)), 1), max(int(round(axes[1] * _ONE)), 1))
    cv2.ellipse(image, middle, half, np.degrees(angle), 0, 360, rgb, -1, cv2.LINE_AA, _SHIFT)


def line(image: np.ndarray, start, stop, width_px: float, rgb: Colour) -> None:
    """Draws a thick line."""
    ends = [(int(round(p[0] * _ONE)), int(round(p[1] * _ONE))) for p in (start, stop)]
    cv2.line(image, *ends, rgb, max(int(round(width_px)), 1), cv2.LINE_AA, _SHIFT)


def _box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _round(rx, ry, cx=0.0, cy=0.0, n=14):
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return list(zip(cx + rx * np.cos(angle), cy + ry * np.sin(angle), strict=True))


# Parts of each shape as (shade, points), painted in this order. Points are in units of the object's radius, y downwards.
SHAPES: dict[str, list[tuple[float, list[tuple[float, float]]]]] = {
    "cup": [(0.6, _round(0.35, 0.4, 0.85, 0.1)), (1.0, [(-0.75, -0.8), (0.75, -0.8), (0.6, 0.85), (-0.6, 0.85)]),
            (0.45, _round(0.75, 0.25, 0, -0.8)), (1.15, _box(-0.5, -0.4, -0.3, 0.6))],
    "disc": [(0.75, _round(1.25, 0.85, 0, 0.08)), (1.0, _round(1.25, 0.8)), (0.85, _round(0.8, 0.5)),
             (1.0, _round(0.7, 0.42))],
    "square": [(0.65, _box(-0.95, -0.55, 0.95, 1.0)), (1.0, [(-1.0, -0.7), (1.0, -0.7), (0.95, 0.4), (-0.95, 0.4)]),
               (0.85, _box(-0.15, -0.7, 0.15, 0.4))],
    "tumbler": [(0.8, _box(-0.6, -0.85, 0.6, 0.9)), (1.1, _round(0.6, 0.2, 0, -0.85)), (0.6, _round(0.45, 0.13, 0, -0.85)),
                (1.25, _box(-0.45, -0.5, -0.25, 0.7)), (0.65, _round(0.6, 0.18, 0, 0.9))],
    "bowl": [(0.8, [(-1.2, -0.35), (1.2, -0.35), (0.75, 0.7), (-0.75, 0.7)]), (1.1, _round(1.2, 0.42, 0, -0.35)),
             (0.55, _round(1.0, 0.32, 0, -0.33))],
    "pan": [(1.4, _box(0.9, -0.12, 2.3, 0.14)), (1.0, _round(1.1, 0.75)), (1.5, _round(0.9, 0.58)), (0.8, _round(0.8, 0.5))],
    "pot": [(0.7, _box(-1.35, -0.3, 1.35, -0.08)), (0.9, _box(-1.0, -0.5, 1.0, 0.9)), (1.2, _round(1.0, 0.35, 0, -0.5)),
            (0.5, _round(0.85, 0.27, 0, -0.5)), (1.25, _box(-0.7, -0.1, -0.45, 0.75))],
    "spoon": [(0.85, _box(-0.1, -0.2, 0.1, 1.7)), (1.0, _round(0.5, 0.7, 0, -0.6)), (0.75, _round(0.3, 0.45, 0, -0.6))],
    "bar": [(0.65, _box(-1.5, 0.3, 1.5, 0.6)), (1.0, _box(-1.5, -0.5, 1.5, 0.3)), (0.88, _box(-1.4, -0.25, 1.4, -0.18)),
            (0.9, _box(-1.3, 0.05, 1.2, 0.12))],
    "drawer": [(0.7, _box(-1.3, -0.9, 1.3, 0.9)), (1.0, _box(-1.15, -0.7, 1.15, 0.7)), (0.4, _box(-0.3, -0.1, 0.3, 0.12))],
    "slab": [(0.7, _box(-1.9, 0.2, 1.9, 0.55)), (1.05, [(-1.6, -0.75), (1.6, -0.75), (1.9, 0.2), (-1.9, 0.2)]),
             (0.9, _box(-1.5, -0.3, 1.5, -0.22))],
    "bottle": [(1.0, _box(-0.5, -0.35, 0.5, 1.1)), (1.0, [(-0.5, -0.35), (0.5, -0.35), (0.2, -0.85), (-0.2, -0.85)]),
               (0.5, _box(-0.22, -1.15, 0.22, -0.85)), (1.5, _box(-0.5, 0.1, 0.5, 0.6))],
    "bucket": [(0.9, [(-1.0, -0.7), (1.0, -0.7), (0.7, 0.9), (-0.7, 0.9)]), (1.15, _round(1.0, 0.33, 0, -0.7)),
               (0.5, _round(0.85, 0.25, 0, -0.7)), (0.7, _box(-0.9, -0.2, 0.9, -0.1))],
    "sheet": [(1.0, [(-1.1, -0.75), (1.05, -0.85), (1.2, 0.7), (-1.0, 0.85)]), (0.9, _box(-0.8, -0.4, 0.8, -0.32)),
              (0.9, _box(-0.8, 0.0, 0.85, 0.08)), (0.9, _box(-0.8, 0.4, 0.5, 0.48))],
    "book": [(0.6, _box(-1.1, -0.7, 1.1, 0.9)), (1.9, _box(-1.0, 0.6, 1.05, 0.82)), (1.0, _box(-1.1, -0.8, 1.1, 0.6)),
             (1.4, _box(-0.6, -0.5, 0.6, -0.2)), (0.7, _box(-1.1, -0.8, -0.85, 0.6))],
    "bag": [(1.0, [(-0.8, -0.7), (0.8, -0.7), (1.0, 0.95), (-1.0, 0.95)]), (0.75, [(-0.8, -0.7), (0, -0.4), (0.8, -0.7), (0, -1.1)]),
            (0.6, _round(0.35, 0.3, 0, 0.25))],
    "shirt": [(0.85, [(-1.5, -0.5), (-0.8, -0.9), (-0.6, 0.1), (-1.2, 0.3)]), (0.85, [(1.5, -0.5), (0.8, -0.9), (0.6, 0.1), (1.2, 0.3)]),
              (1.0, _box(-0.8, -0.9, 0.8, 1.0)), (0.6, _round(0.3, 0.2, 0, -0.9)), (1.3, _box(-0.05, -0.6, 0.05, 0.9))],
    "carrot": [(0.55, [(1.0, -0.35), (1.7, -0.6), (1.5, 0.0), (1.7, 0.5), (1.0, 0.3)]),
               (1.0, [(-1.4, 0.02), (-0.6, -0.28), (1.0, -0.42), (1.0, 0.42), (-0.6, 0.28)]), (0.8, _box(-0.2, -0.3, -0.12, 0.1)),
               (0.8, _box(0.4, -0.2, 0.48, 0.3))],
    "ball": [(0.75, _round(0.85, 0.8, 0.05, 0.08)), (1.0, _round(0.82, 0.76)), (1.25, _round(0.25, 0.2, -0.3, -0.3)),
             (0.7, [(-0.1, -0.7), (0.1, -0.7), (0.0, -1.15)])],
    "loaf": [(0.75, _round(1.35, 0.75, 0, 0.1)), (1.0, _round(1.35, 0.7)), (1.25, [(-0.6, -0.4), (-0.4, -0.4), (-0.5, 0.3), (-0.7, 0.3)]),
             (1.25, [(0.2, -0.45), (0.4, -0.45), (0.3, 0.3), (0.1, 0.3)])],
}  # fmt: skip
_SHAPE_ARRAYS = {name: [(s, np.array(points)) for s, points in parts] for name, parts in SHAPES.items()}


def thing(image, shape: str, rgb, centre, radius_px: float, angle: float = 0.0, stretch: float = 1.0) -> None:
    """Draws an object of a shape, `stretch` times as wide as usual and turned by `angle` radians."""
    cos, sin = np.cos(angle) * radius_px, np.sin(angle) * radius_px
    turn = np.array([[cos * stretch, sin * stretch], [-sin, cos]])
    for factor, points in _SHAPE_ARRAYS[shape]:
        polygon(image, points @ turn + centre, shade(rgb, factor))


def lid(image, rgb, centre, radius_px: float, gap: float) -> None:
    """Draws the dark opening of an object and the lid above it; `gap` is how far it is open, 0 to 1."""
    if gap > 0.05:
        ellipse(
            image, (centre[0], centre[1] - 0.45 * radius_px), (0.8 * radius_px, 0.3 * radius_px * gap), (24, 20, 18)
        )
    top = centre[1] - (0.6 + 1.1 * gap) * radius_px
    points = np.array(_box(-0.95, -0.14, 0.95, 0.14)) @ np.array([[1.0, -0.5 * gap], [0.0, 1.0]]) * radius_px
    polygon(image, points + (centre[0], top), shade(rgb, 1.2))


def hand(image, at, elbow, unit_px: float, skin, sleeve, side: int) -> None:
    """Draws a hand at `at` and its forearm, which comes from `elbow`. `side` is 1 for the right hand, -1 for the left."""
    wrist = (at[0] + 0.25 * (elbow[0] - at[0]), at[1] + 0.25 * (elbow[1] - at[1]))
    line(image, elbow, wrist, 0.085 * unit_px, sleeve)
    line(image, wrist, at, 0.06 * unit_px, skin)
    ellipse(image, at, (0.05 * unit_px, 0.042 * unit_px), skin, 0.4 * side)
    for i in (-1, 0, 1):
        tip = (at[0] - side * (0.02 + 0.016 * i) * unit_px, at[1] - (0.055 - 0.008 * abs(i)) * unit_px)
        line(image, at, tip, 0.022 * unit_px, shade(skin, 0.93 + 0.05 * i))


def tool(image, name: str, at, unit_px: float, angle: float) -> None:
    """Draws a tool held at `at`. At an `angle` of 0 (radians) it points to the left or downwards."""

    def part(points, rgb):
        cos, sin = np.cos(angle) * unit_px, np.sin(angle) * unit_px
        polygon(image, np.array(points) @ np.array([[cos, sin], [-sin, cos]]) + at, rgb)

    match name:
        case "sponge":
            part(_box(-0.10, -0.02, 0.04, 0.06), (238, 208, 40))
            part(_box(-0.10, 0.035, 0.04, 0.06), (40, 130, 70))
        case "knife":
            part([(-0.24, 0.03), (-0.02, -0.01), (-0.02, 0.05), (-0.2, 0.06)], (214, 218, 224))
            part(_box(-0.03, -0.015, 0.09, 0.03), (30, 26, 24))
        case "spoon":
            part(_box(-0.02, -0.02, 0.005, 0.15), (140, 96, 52))
            part(_round(0.03, 0.035, -0.008, 0.16), (150, 104, 58))
        case "cloth":
            part([(-0.12, -0.02), (0.06, -0.04), (0.08, 0.05), (-0.02, 0.075), (-0.13, 0.05)], (190, 60, 110))
        case "scraper":
            part(_box(-0.025, -0.02, 0.015, 0.07), (60, 60, 64))
            part([(-0.085, 0.07), (0.075, 0.07), (0.085, 0.11), (-0.095, 0.11)], (198, 200, 206))
        case "hammer":
            part(_box(-0.2, 0.0, 0.06, 0.025), (168, 120, 66))
            part(_box(-0.24, -0.05, -0.18, 0.075), (82, 84, 92))


def water(image, x: float, top: float, bottom: float, width_px: float, wobble: float) -> None:
    """Draws a stream of water from `top` to `bottom` (y, px)."""
    points = [(x - width_px, top), (x + width_px, top), (x + width_px * (0.7 + wobble), bottom), (x - width_px, bottom)]
    polygon(image, np.array(points), (176, 208, 232))


def machine(image, kind: str, centre, unit_px: float, running: bool, time_s: float) -> None:
    """Draws a washer, blender, fan or TV. While it runs, its drum, contents, blades or picture move."""
    x, y = centre
    phase = 2 * np.pi * time_s if running else 0.3
    shake = 0.004 * unit_px * np.sin(40 * phase) if running and kind != "tv" else 0.0
    at = np.array([x + shake, y])
    match kind:
        case "washer":
            polygon(image, np.array(_box(-0.17, -0.2, 0.17, 0.2)) * unit_px + at, (222, 224, 228))
            ellipse(image, at, (0.12 * unit_px, 0.12 * unit_px), (80, 84, 92))
            ellipse(image, at, (0.095 * unit_px, 0.095 * unit_px), (40, 64, 110))
            for k in range(3):
                turn = 1.4 * phase + 2.1 * k
                spot = at + 0.055 * unit_px * np.array([np.cos(turn), np.sin(turn)])
                ellipse(
                    image, spot, (0.03 * unit_px, 0.022 * unit_px), ((210, 90, 90), (230, 220, 120), (120, 200, 150))[k]
                )
        case "blender":
            polygon(image, np.array(_box(-0.07, 0.06, 0.07, 0.2)) * unit_px + at, (60, 62, 70))
            polygon(
                image,
                np.array([(-0.1, -0.2), (0.1, -0.2), (0.06, 0.06), (-0.06, 0.06)]) * unit_px + at,
                (190, 212, 206),
            )
            level = -0.02 + (0.03 * np.sin(3.1 * phase) if running else 0.0)
            polygon(image, np.array([(-0.085, -0.1 + level), (0.085, -0.1 - level), (0.06, 0.06), (-0.06, 0.06)]) * unit_px + at,
                    (206, 66, 90))  # fmt: skip
        case "fan":
            line(image, at, at + (0, 0.22 * unit_px), 0.03 * unit_px, (90, 94, 100))
            ellipse(image, at, (0.17 * unit_px, 0.17 * unit_px), (204, 210, 214))
            for k in range(3):
                turn = 3.3 * phase + 2.094 * k
                tip = at + 0.1 * unit_px * np.array([np.cos(turn), np.sin(turn)])
                ellipse(image, tip, (0.065 * unit_px, 0.03 * unit_px), (70, 110, 160), turn)
        case "tv":
            polygon(image, np.array(_box(-0.24, -0.16, 0.24, 0.14)) * unit_px + at, (24, 24, 28))
            flicker = int(time_s * 2.5) if running else -1
            rgb = (34, 36, 42) if flicker < 0 else tuple(int(60 + (flicker * k) % 180) for k in (53, 97, 139))
            polygon(image, np.array(_box(-0.215, -0.135, 0.215, 0.115)) * unit_px + at, rgb)
            if flicker >= 0:
                ellipse(
                    image, at + (0.1 * np.sin(phase) * unit_px, 0), (0.06 * unit_px, 0.08 * unit_px), (230, 190, 160)
                )
