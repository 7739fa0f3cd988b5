"""Makes a SoundWorld's clips as arrays in memory: rendered, never encoded, decoded or written. Needs neither Beam nor PyAV.

For machines on which the tables take minutes. Clips are chosen as in the conversion. Those of training videos are the
wearer's narrations, without those the narrator is unsure of; those of the other videos are one labelled narration per action.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing

import numpy as np
import soxr

from data_prep import windows
from data_prep.soundworld import annotate, plan, scene, sound
from mc3_jax.data.records import SAMPLE_RATE_HZ

WINDOW_S = (0.5, 1.0)
NUM_INTERVALS, NUM_CANDIDATES = 4, 2


@dataclasses.dataclass
class Clips:
    """The n clips of a split.

    Attributes:
      video: uint8 [n, T * C, height, width, 3], interval-major; candidate C // 2 is the middle of its interval.
      video_size: int32 [n, 2], (height, width) of the frames on the canvas.
      audio: int16 [n, samples] at 16 kHz.
      texts: Narration of each clip.
      label: int32 [n], whether the action sounds: 1 yes, 0 no, -1 not annotated.
      verb_id, noun_id: int32 [n], ids of the action's verb and noun.
      region: Region of each clip in the paper's Fig. 2, e.g. "III"; "III, drowned" if the action is quieter than the noise.
      video_clips: Number of clips of each video, in the order of the clips.
    """

    video: np.ndarray
    video_size: np.ndarray
    audio: np.ndarray
    texts: list[str]
    label: np.ndarray
    verb_id: np.ndarray
    noun_id: np.ndarray
    region: list[str]
    video_clips: list[int]

    def __len__(self) -> int:
        return len(self.texts)


def _narrations(video: plan.Video) -> list[tuple[annotate.Narration, int]]:
    """Returns (narration, label) for each clip of a video."""
    lines = annotate.narrate(video)
    if video.split == "train":
        wanted = [line for line in lines if video.segments[line.segment].wearer and "#unsure" not in line.text]
        return [(line, -1) for line in wanted]
    rows = {row[1]: int(sum(row[5:]) >= 2) for row in annotate.label_rows(video, lines)}
    return [(line, rows[line.annotation_uid]) for line in lines if line.annotation_uid in rows]


def _place(segment: plan.Segment) -> str:
    return "III, drowned" if segment.drowned else segment.region


def render_video(index: int, *, seed: int, short_side_px: int, video_s: float) -> list[dict]:
    """Returns the clips of one video, each as a dictionary; a video without sound has none.

    Args:
      index: Index of the video in its world.
      seed: Seed of the world.
      short_side_px: Height of the frames.
      video_s: Mean length of the world's videos in seconds.
    """
    video = plan.plan_video(seed, index, video_s, short_side_px)
    if not video.has_audio:
        return []
    heard = sound.synthesize(video, []).mean(axis=0)
    heard = soxr.resample(heard, video.sample_rate_hz, SAMPLE_RATE_HZ)
    pcm = (np.clip(heard, -1, 1) * 32767).astype(np.int16)
    kept = []
    for line, label in _narrations(video):
        start_s, stop_s = line.timestamp_s - WINDOW_S[0], line.timestamp_s + WINDOW_S[1]
        first = round((start_s - video.audio_start_s) * SAMPLE_RATE_HZ)
        last = first + windows.num_samples(sum(WINDOW_S))
        if first < 0 or last > len(pcm) or stop_s > video.duration_s - 1 / video.fps:
            continue
        times_s = windows.frame_times(start_s, stop_s, NUM_INTERVALS, NUM_CANDIDATES)
        kept.append((line, label, pcm[first:last], np.round(np.array(times_s) * video.fps).astype(int)))
    wanted = {int(place) for *_, places in kept for place in places}
    frames = {place: frame.copy() for place, frame in enumerate(scene.render_frames(video)) if place in wanted}
    return [
        {"video": np.stack([frames[int(place)] for place in places]), "audio": audio, "text": line.text, "label": label,
         "verb_id": video.segments[line.segment].verb, "noun_id": video.segments[line.segment].noun,
         "region": _place(video.segments[line.segment]), "split": video.split, "index": index}
        for line, label, audio, places in kept
    ]  # fmt: skip


def render(
    num_videos: int, *, seed: int, short_side_px: int, num_workers: int, video_s: float = 60.0
) -> dict[str, Clips]:
    """Returns split → clips of a world, in the order of its videos for any number of workers.

    Args:
      num_videos: Number of videos. Of a minute's length, each gives 17 training clips or 18 to 25 labelled ones.
      seed: Seed of the world.
      short_side_px: Height of the frames, which are at most 16/9 as wide.
      num_workers: Number of processes that render.
      video_s: Mean length of a video in seconds.
    """
    job = functools.partial(render_video, seed=seed, short_side_px=short_side_px, video_s=video_s)
    width = round(short_side_px * 16 / 9 / 2) * 2
    found: dict[str, list[dict]] = {name: [] for name in ("train", "validation", "test")}
    # Spawned, not forked: JAX may already run threads in this process, with which a fork could hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        for clips in pool.map(job, range(num_videos), chunksize=4):
            for clip in clips:
                found[clip["split"]].append(clip)
    return {name: _stack(clips, short_side_px, width) for name, clips in found.items()}


def _stack(clips: list[dict], height: int, width: int) -> Clips:
    video = np.zeros((len(clips), NUM_INTERVALS * NUM_CANDIDATES, height, width, 3), np.uint8)
    sizes = np.zeros((len(clips), 2), np.int32)
    for i, clip in enumerate(clips):
        sizes[i] = clip["video"].shape[1:3]
        video[i, :, : sizes[i, 0], : sizes[i, 1]] = clip["video"]

    def column(name: str) -> np.ndarray:
        return np.array([clip[name] for clip in clips], np.int32)

    audio = np.stack([clip["audio"] for clip in clips]) if clips else np.zeros((0, 24_000), np.int16)
    return Clips(
        video, sizes, audio, [clip["text"] for clip in clips], column("label"), column("verb_id"), column("noun_id"),
        [clip["region"] for clip in clips], list(collections.Counter(clip["index"] for clip in clips).values()),
    )  # fmt: skip
