"""Moments of videos ranked by their similarity to a query, and the page that shows the best of them."""

import csv
import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from mc3_jax import whole_file
from mc3_jax.evals import media, page

FILE = "moments.npz"
SCORES = ("audio", "video", "both")  # what a query may be compared with
AGREEMENT = "sound and sight agree"  # title of the ranking without a query


@dataclasses.dataclass(frozen=True)
class Moments:
    """Clips and their embeddings, in the order of the data set.

    Attributes:
      audio, video: L2-normalised embeddings.
      clip_id, video_uid: Clip id and video of each moment.
      start_us, stop_us: Start and end of each moment within its video.
    """

    audio: Float[np.ndarray, "n d"]
    video: Float[np.ndarray, "n d"]
    clip_id: np.ndarray
    video_uid: np.ndarray
    start_us: Int[np.ndarray, " n"]
    stop_us: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.clip_id)

    @property
    def agreement(self) -> Float[np.ndarray, " n"]:
        """Cosine of each moment's sound and frames: the score by which discovery ranks clips (SoundingActions, Sec. 3)."""
        return np.sum(self.audio * self.video, axis=1)


@dataclasses.dataclass(frozen=True)
class Hit:
    """A moment found.

    Attributes:
      rank: Rank among the hits, from 1.
      row: Row of the moment in `Moments`.
      score: Score that the ranking is by.
      audio, video: Cosines of the query with the moment's sound and frames; None without a query, or if the tower was never
        trained.
      agreement: Cosine of the moment's sound and frames; None if one of their towers was never trained.
    """

    rank: int
    row: int
    score: float
    audio: float | None
    video: float | None
    agreement: float | None


def find(
    moments: Moments, query: Float[np.ndarray, " d"] | None, by: str, top: int, untrained: Sequence[str] = ()
) -> list[Hit]:
    """Returns the best moments, the best first; a moment that overlaps with a better one in time is skipped.

    Args:
      moments: Moments to search.
      query: L2-normalised embedding of a text or a sound; None ranks by `Moments.agreement`.
      by: One of `SCORES`: the query's cosine with the sound, with the frames, or the mean of both.
      top: Maximum number of hits.
      untrained: Towers that were never trained: hits have no cosines with their embeddings. The score is of none of them.
    """
    audio, video = (None, None) if query is None else (moments.audio @ query, moments.video @ query)
    agreement = moments.agreement
    # Without a query, a moment's score is its own agreement.
    score = agreement if query is None else {"audio": audio, "video": video, "both": (audio + video) / 2}[by]
    shown = (
        None if "audio" in untrained else audio,
        None if "video" in untrained else video,
        None if {"audio", "video"} & {*untrained} else agreement,
    )
    hits: list[Hit] = []
    taken: dict[str, list[tuple[int, int]]] = {}
    for row in np.argsort(-score, kind="stable").tolist():
        if len(hits) == top:
            break
        start, stop = int(moments.start_us[row]), int(moments.stop_us[row])
        spans = taken.setdefault(str(moments.video_uid[row]), [])
        if any(start < other_stop and other_start < stop for other_start, other_stop in spans):
            continue
        spans.append((start, stop))
        cosines = (None if values is None else float(values[row]) for values in shown)
        hits.append(Hit(len(hits) + 1, row, float(score[row]), *cosines))
    return hits


def save(path: pathlib.Path, moments: Moments, made_of: str) -> None:
    """Writes moments atomically, as plain arrays named like their attributes.

    Args:
      path: Path of the file.
      moments: Moments to write.
      made_of: Digest of the clips and the model, which `load` compares.
    """
    with whole_file.writing(path) as aside, aside.open("wb") as f:
        np.savez(f, made_of=np.array(made_of), **{f.name: getattr(moments, f.name) for f in dataclasses.fields(Moments)})


def load(path: pathlib.Path, made_of: str) -> Moments | None:
    """Returns what `save` wrote for the same digest; None if there is no such file. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["made_of"]) != made_of:
                return None
            moments = Moments(**{field.name: arrays[field.name] for field in dataclasses.fields(Moments)})
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return moments


def clock(time_us: int) -> str:
    """Returns a time as h:mm:ss.s, or m:ss.s below an hour."""
    tenths = round(time_us / 1e5)
    minutes, seconds = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    front = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{front}:{seconds // 10:02d}.{seconds % 10}"


def write_csv(path: pathlib.Path, moments: Moments, found: Mapping[str, Sequence[Hit]]) -> None:
    """Writes a row for every hit of every query; times are seconds of the video, scores are cosines."""
    with whole_file.writing(path) as aside, aside.open("w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(
            ("query", "rank", "score", "audio", "video", "audio_video", "video_uid", "start_s", "stop_s", "clip_id")
        )
        for query, hits in found.items():
            for hit in hits:
                cosines = (hit.score, hit.audio, hit.video, hit.agreement)
                times = (moments.start_us[hit.row] / 1e6, moments.stop_us[hit.row] / 1e6)
                out.writerow(
                    (query, hit.rank, *("" if c is None else f"{c:.4f}" for c in cosines), moments.video_uid[hit.row],
                     *(f"{t:.3f}" for t in times), moments.clip_id[hit.row])
                )  # fmt: skip


def write_page(
    folder: pathlib.Path, moments: Moments, found: Mapping[str, Sequence[Hit]], *, title: str, facts: str, by: str, source
) -> pathlib.Path:
    """Writes `folder/index.html`, which shows every hit with its frames and sound, and returns its path.

    Args:
      folder: Created if missing.
      moments: Row i is clip i of `source`.
      found: Query → its hits.
      title, facts: Title of the page and the line below it.
      by: See `find`.
      source: `loader.ClipSource` of the moments.
    """
    hits = [hit for some in found.values() for hit in some]
    clips = media.gather(source, (), {hit.row for hit in hits})
    return page.write(
        folder, "moments.html.j2", title=title, facts=facts, clips=clips, by=by,
        asked=any(hit.audio is not None or hit.video is not None for hit in hits),
        agreeing=any(hit.agreement is not None for hit in hits),
        sections=[(f"query-{i}", query) for i, query in enumerate(found, 1)], queries=list(found.items()),
        cosines_of=_describe_cosines, video_of=lambda hit: str(moments.video_uid[hit.row]),
        time_of=lambda hit: clock(int(moments.start_us[hit.row])),
    )  # fmt: skip


def _describe_cosines(hit: Hit) -> str:
    """Returns the hit's cosines in words; "" without a query, where the score is the only one."""
    if hit.audio is None and hit.video is None:
        return ""
    cosines = {"sound": hit.audio, "frames": hit.video, "sound with frames": hit.agreement}
    return ", ".join(f"{name} {value:.3f}" for name, value in cosines.items() if value is not None)
