"""Plans what happens in a SoundWorld video, as a pure function of (seed, video index), before any drawing or synthesis.

The regions are those of the paper's Fig. 2: I, the action is seen, heard and narrated; II, it is seen and narrated but
silent, while a visible machine hums; III, it is seen and narrated, but silent or drowned by other sounds; IV, it is heard
and narrated, but out of view.
"""

import dataclasses
import uuid

import numpy as np

from data_prep.soundworld import motion, taxonomy

ROOMS = ("kitchen", "workshop", "garden", "office", "bathroom", "living_room", "garage", "market")
MACHINES = ("washer", "blender", "fan", "tv")
DISTRACTORS = ("talk", "traffic", "music", "clatter", "footsteps", "wind")
SPLIT_SHARES = (("train", 0.68), ("validation", 0.08), ("test", 0.24))


@dataclasses.dataclass
class Distractor:
    """A sound with no visible cause, over [start_s, stop_s) of the video, `level_db` above the usual level of an action."""

    kind: str
    start_s: float
    stop_s: float
    level_db: float
    seed: int


@dataclasses.dataclass
class Segment:
    """One action: what is done, what is seen of it, what is heard of it and when it is narrated.

    Attributes:
      start_s, stop_s: Interval of the action in the video, seconds.
      narration_s: The narrator's (approximate) timestamp in the video, seconds.
      verb, noun: Indices in `taxonomy.VERBS`, `taxonomy.NOUNS`.
      wearer: False for somebody else's action, off-screen, narrated with #O.
      region: "I", "II", "III" or "IV".
      drowned: Whether the action sounds but is drowned by other sounds; only in region III.
      machine: The one of `MACHINES` that is visible and runs during the segment, or "".
      rate_hz, amplitude, phase: Parameters of the motion; see `motion.pose`.
      action_db: Level of the action's sound relative to the usual one, dB; None where it is silent.
      level_db: Level to which the recorder's gain control brings the segment, dBFS (RMS). Independent of the region.
      clutter: Other objects that lie about, [(noun index, x, y)], relative to the work place in units of 1.2 picture heights.
      place: (x, y) of the work place in the picture, x as a share of its width, y of its height.
      seed: Seed of everything random in drawing and synthesising the segment.
    """

    start_s: float
    stop_s: float
    narration_s: float
    verb: int
    noun: int
    wearer: bool
    region: str
    drowned: bool
    machine: str
    rate_hz: float
    amplitude: float
    phase: float
    action_db: float | None
    level_db: float
    clutter: list[tuple[int, float, float]]
    place: tuple[float, float]
    seed: int

    def pose(self, time_s: np.ndarray) -> motion.Pose:
        """Returns the pose at times of the video, [n] seconds."""
        duration = self.stop_s - self.start_s
        name = taxonomy.VERBS[self.verb].motion
        return motion.pose(name, time_s - self.start_s, duration, self.rate_hz, self.amplitude, self.phase)

    def contacts(self) -> list[tuple[float, float]]:
        """Returns the action's impacts as (seconds in the video, strength)."""
        name = taxonomy.VERBS[self.verb].motion
        hits = motion.contacts(name, self.stop_s - self.start_s, self.rate_hz, self.amplitude, self.phase)
        return [(self.start_s + t, strength) for t, strength in hits]


@dataclasses.dataclass
class Video:
    """One video of the world: format, looks, and everything that happens in it.

    Attributes:
      uid: Ego4D-like video uid (a UUID).
      index: Index of the video in the world.
      split: "train", "validation" or "test".
      duration_s, fps, width_px, height_px: Length, frame rate and size of the picture.
      sample_rate_hz, num_channels: Sample rate and channels of the audio stream.
      has_audio: False for a few videos without any audio stream.
      audio_start_s: When the audio stream begins, seconds after the video; 0 for most.
      room: One of `ROOMS`.
      seed: Seed of the room's looks and sound, the hands' colours, the stereo sound, the narrations and their labels.
      segments: Actions in order of time.
      distractors: Sounds without a visible cause.
    """

    uid: str
    index: int
    split: str
    duration_s: float
    fps: int
    width_px: int
    height_px: int
    sample_rate_hz: int
    num_channels: int
    has_audio: bool
    audio_start_s: float
    room: str
    seed: int
    segments: list[Segment]
    distractors: list[Distractor]


def split_of(index: int) -> str:
    """Returns the split of video `index`; splits have their `SPLIT_SHARES` and are spread evenly over the indices."""
    position = (index * 0.6180339887498949) % 1.0  # golden-ratio order: any prefix of videos has about the same shares
    total = 0.0
    for name, share in SPLIT_SHARES:
        total += share
        if position < total:
            return name
    return SPLIT_SHARES[-1][0]


def plan_video(seed: int, index: int, duration_s: float, short_side_px: int) -> Video:
    """Returns the plan of one video.

    Args:
      seed: Seed of the world.
      index: Index of the video, 0 or more.
      duration_s: Mean length of the videos, seconds; each is 0.75 to 1.25 times as long.
      short_side_px: Height of the picture, px; even.
    """
    rng = np.random.default_rng([seed, index])
    uid = str(uuid.UUID(bytes=rng.bytes(16), version=4))
    wide = rng.random() < 0.8
    width_px = int(round(short_side_px * (16 / 9 if wide else 4 / 3) / 2)) * 2
    video = Video(
        uid=uid,
        index=index,
        split=split_of(index),
        duration_s=float(duration_s * rng.uniform(0.75, 1.25)),
        fps=int(rng.choice([25, 30])),
        width_px=width_px,
        height_px=short_side_px,
        sample_rate_hz=int(rng.choice([44100, 48000])),
        num_channels=int(rng.choice([1, 2])),
        has_audio=bool(rng.random() >= 0.04),
        audio_start_s=float(rng.uniform(0.4, 2.5)) if rng.random() < 0.06 else 0.0,
        room=str(rng.choice(ROOMS)),
        seed=int(rng.integers(2**31)),
        segments=[],
        distractors=[],
    )
    _fill(video, rng)
    return video


def _fill(video: Video, rng: np.random.Generator) -> None:
    """Adds segments and distractors to `video` in place."""
    pairs = taxonomy.pair_weights()
    weights = np.array([w for _, _, w in pairs])
    weights /= weights.sum()
    # As in real footage, a video is about something: a few verb-noun pairs recur in it. The others are drawn from all pairs.
    favourites = rng.choice(len(pairs), size=6, replace=False, p=weights)
    machine_at_hand = str(rng.choice(MACHINES)) if rng.random() < 0.6 else ""
    t = float(rng.uniform(0.8, 1.5))
    while t < video.duration_s - 2.2:
        length = float(rng.uniform(1.5, 2.1))
        pick = int(rng.choice(favourites)) if rng.random() < 0.25 else int(rng.choice(len(pairs), p=weights))
        segment = _plan_segment(pairs[pick][:2], t, length, machine_at_hand, rng)
        video.segments.append(segment)
        _add_distractors(video, segment, rng)
        t += length + float(rng.uniform(0.1, 0.5))


def _plan_segment(
    pair: tuple[int, int], start_s: float, length_s: float, machine_at_hand: str, rng: np.random.Generator
) -> Segment:
    verb, noun = pair
    spec = taxonomy.VERBS[verb]
    wearer = bool(rng.random() >= 0.06)
    region = "I" if rng.random() < spec.sounding_rate else str(rng.choice(["II", "III", "IV"], p=[0.2, 0.66, 0.14]))
    if region == "II" and not machine_at_hand:
        region = "III"
    machine_too = region == "I" and bool(machine_at_hand) and rng.random() < 0.12
    drowned = region == "III" and bool(rng.random() < 0.25)
    action_db: float | None
    if region == "II" or (region == "III" and not drowned):
        action_db = None
    else:
        action_db = float(rng.normal(-22.0, 2.0) if drowned else rng.normal(0.0, 3.5))
    return Segment(
        start_s=start_s,
        stop_s=start_s + length_s,
        # The narrator marks a moment a little after the action began.
        narration_s=start_s + 0.45 + float(np.clip(rng.normal(0.0, 0.15), -0.35, 0.35)),
        verb=verb,
        noun=noun,
        wearer=wearer,
        region=region,
        drowned=drowned,
        machine=machine_at_hand if region == "II" or machine_too else "",
        rate_hz=float(rng.uniform(*spec.rate_hz)),
        amplitude=float(rng.uniform(0.8, 1.2)),
        phase=float(rng.uniform(0.0, 2.0 * np.pi)),
        action_db=action_db,
        level_db=float(rng.normal(-24.0, 3.0)),
        clutter=[
            (
                int(rng.integers(len(taxonomy.NOUNS))),
                float(side * rng.uniform(0.42, 0.75)),
                float(rng.uniform(-0.2, 0.2)),
            )
            for side in rng.choice([-1, 1], size=int(rng.integers(0, 3)))
        ],
        place=(float(rng.uniform(0.42, 0.58)), float(rng.uniform(0.52, 0.64))),
        seed=int(rng.integers(2**31)),
    )


def _add_distractors(video: Video, segment: Segment, rng: np.random.Generator) -> None:
    """Adds the distractors around a segment. Silent segments get more, so that loudness does not give the label away."""
    heard = segment.action_db is not None and not segment.drowned
    chance = 0.35 if heard else 0.90
    # Clatter, which sounds like struck objects, is commoner there, so that onsets do not give the label away either.
    shares = [0.22, 0.12, 0.16, 0.28, 0.16, 0.06] if heard else [0.16, 0.07, 0.10, 0.52, 0.12, 0.03]
    kinds = rng.choice(DISTRACTORS, size=2, replace=False, p=shares)
    for i, kind in enumerate(kinds):
        if rng.random() >= chance / (1 + 2 * i):
            continue
        level = rng.normal(-6.0, 3.0) if heard else rng.normal(0.0, 3.0)
        start = segment.start_s - float(rng.uniform(0.1, 0.5))
        stop = segment.stop_s + float(rng.uniform(0.0, 0.4))
        video.distractors.append(Distractor(str(kind), start, stop, float(level), int(rng.integers(2**31))))
