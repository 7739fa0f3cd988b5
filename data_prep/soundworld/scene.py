"""Draws the frames of a SoundWorld video: a room in its light, a work place, hands, tool, object and machine."""

import itertools
from collections.abc import Iterator

import cv2
import numpy as np

from data_prep.soundworld import drawing, taxonomy
from data_prep.soundworld.plan import Segment, Video

# Colours of wall and table in each room, RGB; each video varies them.
_ROOM_COLOURS = {
    "kitchen": ((206, 200, 182), (168, 150, 128)),
    "workshop": ((128, 122, 112), (122, 96, 66)),
    "garden": ((112, 152, 92), (132, 116, 88)),
    "office": ((196, 202, 212), (150, 122, 96)),
    "bathroom": ((186, 210, 216), (214, 214, 212)),
    "living_room": ((190, 168, 146), (110, 76, 54)),
    "garage": ((112, 116, 122), (88, 88, 92)),
    "market": ((214, 190, 128), (104, 126, 84)),
}
_SKINS = ((236, 196, 166), (214, 168, 132), (178, 126, 90), (124, 82, 58), (92, 60, 44))
_CLOSENESS = 1.5  # unit of the work, in picture heights: larger than the room's, since the work is nearer to the camera
_TURN_HEIGHTS = 1.15  # how far the view is turned aside from an action out of view, in picture heights


class _Looks:
    """Looks that a video keeps throughout: light, skin, sleeves, a wide picture of the room, and the machine in it."""

    def __init__(self, video: Video):
        rng = np.random.default_rng([video.seed, 10])
        self.unit_px = video.height_px
        # Light: overall exposure and a colour cast from lamps to daylight.
        warmth = rng.uniform(-0.12, 0.12)
        self.light = rng.uniform(0.6, 1.12) * np.array([1 + warmth, 1.0, 1 - warmth])
        self.skin = drawing.shade(_SKINS[rng.integers(len(_SKINS))] * self.light, 1.0)
        self.sleeve = drawing.shade(rng.integers(30, 220, 3) * self.light, 1.0)
        self.margin_x = int(1.4 * self.unit_px)
        self.margin_y = max(int(0.06 * self.unit_px), 2)
        self.machine = next((s.machine for s in video.segments if s.machine), "")
        self.machine_x = video.width_px / 2 + rng.choice([-1, 1]) * rng.uniform(0.62, 0.72) * self.unit_px
        self.room = self._draw_room(video, rng)

    def _draw_room(self, video: Video, rng: np.random.Generator) -> np.ndarray:
        """Returns a picture of wall and table that is larger than a frame: by `margin_x` and `margin_y` px on each side."""
        height, width = video.height_px + 2 * self.margin_y, video.width_px + 2 * self.margin_x
        wall, table = (np.array(c) * rng.uniform(0.85, 1.12, 3) for c in _ROOM_COLOURS[video.room])
        horizon = int(height * rng.uniform(0.24, 0.36))
        picture = np.empty((height, width, 3), np.float32)
        picture[:horizon] = wall
        picture[horizon:] = table
        step = int(rng.integers(14, 30) * self.unit_px / 112)
        if rng.random() < 0.5:
            picture[:horizon:step] *= 0.86
            picture[:horizon, ::step] *= 0.86
        if rng.random() < 0.6:
            picture[horizon::step] *= 0.92
        for _ in range(10):  # shelves, windows, posters
            x, y = rng.integers(0, width), rng.integers(0, max(horizon - 8, 1))
            w, h = rng.integers(10, 44), rng.integers(6, 30)
            picture[y : min(y + h, horizon), x : x + w] = rng.uniform(40, 230, 3)
        grain = cv2.resize(rng.normal(0, 1, (height // 5 + 1, width // 5 + 1)).astype(np.float32), (width, height))
        picture *= 1.0 + rng.uniform(0.02, 0.07) * grain[..., None]
        # One side is brighter, being nearer to the lamp.
        slope = rng.uniform(-0.25, 0.25)
        picture *= (1.0 + slope * np.linspace(-1, 1, width, dtype=np.float32))[None, :, None]
        return np.clip(picture * self.light, 0, 255).astype(np.uint8)

    def instance_rgb(self, noun: int, rng: np.random.Generator):
        """Returns the colour of one instance of a noun in this light."""
        rgb = np.array(taxonomy.NOUNS[noun].rgb) * rng.uniform(0.8, 1.15) + rng.normal(0, 14, 3)
        return drawing.shade(np.clip(rgb, 5, 255) * self.light, 1.0)


class _Action:
    """One segment, prepared for drawing: its poses, its object instance, and the room with the clutter in it."""

    def __init__(self, video: Video, segment: Segment, looks: _Looks, times_s: np.ndarray):
        rng = np.random.default_rng([segment.seed, 11])
        self.unit_px, self.looks, self.segment = _CLOSENESS * looks.unit_px, looks, segment
        self.verb, self.noun = taxonomy.VERBS[segment.verb], taxonomy.NOUNS[segment.noun]
        self.pose, self.times_s = segment.pose(times_s), times_s
        self.rgb = looks.instance_rgb(segment.noun, rng)
        self.radius_px = 0.115 * self.noun.size**0.45 * rng.uniform(0.9, 1.1) * self.unit_px
        self.mirrored = rng.random() < 0.15  # left-handed
        self.out_of_view = segment.region == "IV" or not segment.wearer
        self.turn_px = rng.choice([-1, 1]) * _TURN_HEIGHTS * looks.unit_px * self.out_of_view
        self.width_px, self.height_px = video.width_px, video.height_px
        self.work = np.array([segment.place[0] * video.width_px, segment.place[1] * video.height_px])
        self.sway = rng.uniform(0, 2 * np.pi, 4)
        self.background = looks.room.copy()
        offset = np.array([looks.margin_x, looks.margin_y])
        for noun, x, y in segment.clutter:
            spec = taxonomy.NOUNS[noun]
            at = self.work + offset + np.array([x, y]) * looks.unit_px * 1.2
            radius = 0.1 * spec.size**0.45 * looks.unit_px
            drawing.thing(self.background, spec.shape, looks.instance_rgb(noun, rng), at, radius)

    def draw(self, i: int) -> np.ndarray:
        """Returns the frame at `times_s[i]`, uint8 [height, width, 3]."""
        looks, t = self.looks, self.times_s[i]
        swing = 0.018 * looks.unit_px * np.sin(2 * np.pi * np.array([0.31, 0.47]) * t + self.sway[:2])
        left = int(round(looks.margin_x + swing[0] + self.turn_px))
        top = int(round(looks.margin_y + np.clip(swing[1], -looks.margin_y, looks.margin_y)))
        frame = self.background[top : top + self.height_px, left : left + self.width_px].copy()
        shift = np.array([looks.margin_x - left, looks.margin_y - top], np.float64)
        if looks.machine:
            at = np.array([looks.machine_x, 0.36 * self.height_px]) + shift
            drawing.machine(frame, looks.machine, at, looks.unit_px, bool(self.segment.machine), t)
        if not self.out_of_view:
            self._draw_work(frame, i, self.work + shift)
        return frame

    def _draw_work(self, frame: np.ndarray, i: int, work: np.ndarray) -> None:
        """Draws object, tool and hands at `times_s[i]` into `frame`; `work` is the work place in it, px."""
        p, unit, radius = self.pose, self.unit_px, self.radius_px
        flip = np.array([-1.0 if self.mirrored else 1.0, 1.0])
        at = work + flip * (p.object_x[i], p.object_y[i]) * unit
        motion, gap, angle = self.verb.motion, p.gap[i], p.angle[i] * flip[0]
        if motion in ("lift", "place", "drop", "hold", "pour", "shake"):
            drawing.ellipse(frame, work + (0, 0.8 * radius), (radius, 0.25 * radius), (40, 36, 34))  # object's shadow
        if motion == "tear":
            for side in (-1, 1):
                drawing.thing(frame, self.noun.shape, self.rgb, at + (side * (0.45 + 0.9 * gap) * radius, 0), radius,
                              0.25 * side * gap, 0.5)  # fmt: skip
        else:
            drawing.thing(frame, self.noun.shape, self.rgb, at, radius, angle, 1.0 + 0.5 * min(gap, 0.0))
        if motion in ("open", "close"):
            drawing.lid(frame, self.rgb, at, radius, gap)
        wobble = 0.5 * np.sin(23.0 * self.times_s[i])
        if motion == "pour" and p.speed[i] > 0.1:
            mouth = at + flip * (1.1 * radius, 0.1 * radius)
            drawing.water(frame, mouth[0], mouth[1], work[1] + 0.12 * unit, 0.012 * unit * p.speed[i] + 0.5, wobble)
        if self.verb.name == "wash":
            drawing.water(frame, at[0] - 0.3 * radius, 0, at[1], 0.014 * unit, wobble)
        for side, x, y in ((-1, p.left_x[i], p.left_y[i]), (1, p.right_x[i], p.right_y[i])):
            spot = work + flip * (x, y) * unit
            if side == 1 and self.verb.tool:
                tool_at = spot + (0.0, 0.02 * unit)
                drawing.tool(frame, self.verb.tool, tool_at, unit, p.tool_angle[i])
            elbow = (spot[0] * 0.6 + work[0] * 0.4 + flip[0] * side * 0.3 * unit, self.height_px + 0.1 * unit)
            drawing.hand(frame, spot, elbow, unit, self.looks.skin, self.looks.sleeve, side * int(flip[0]))


def render_frames(video: Video) -> Iterator[np.ndarray]:
    """Yields the video's frames in order, uint8 RGB [height_px, width_px, 3].

    During an action out of view (region IV, or somebody else's) they show another part of the room.
    """
    looks = _Looks(video)
    times_s = np.arange(int(video.duration_s * video.fps)) / video.fps
    # Half of the pause between two actions belongs to each.
    segments = video.segments
    cuts = [(a.stop_s + b.start_s) / 2 for a, b in itertools.pairwise(segments)]
    for segment, part in zip(segments, np.split(times_s, np.searchsorted(times_s, cuts)), strict=True):
        action = _Action(video, segment, looks, part)
        for i in range(len(part)):
            yield action.draw(i)
