"""Pieces of a shard: the clips and rejects of one item in a file of their own, so that a killed run loses at most one video.

A file is named by the hash of what it is made from, which does not depend on shard or worker, and by its counts, so that a
listing shows the progress of a run. Layout: records; the index as JSON; its length, 8 bytes; the SHA-256 of all that, 32
bytes.

A rerun tries rejected clips again if the reason lay outside the item: always if the machine could not read the file, and if
a limit was exceeded, when that limit is higher now.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from data_prep import guard, storage, streams
from mc3_jax.data import records

FOLDER = "spool"  # inside the data set's folder; empty when a conversion is done
NAME = r"(?P<key>[0-9a-f]{32})-(?P<num_clips>\d+)-(?P<num_rejects>\d+)\.piece"

# Settings that do not change what a piece holds, only where and how it is made. Media files are identified by size and time.
PASSING = ("scratch", "video_dir", "media_dir", "cpu_limit_s", "memory_limit_mb")
_LIMITS = {guard.TOOK_TOO_LONG: "cpu_limit_s", streams.OUT_OF_MEMORY: "memory_limit_mb"}  # reject's reason → limit


@dataclasses.dataclass(frozen=True)
class Piece:
    """The clips and rejects of one item, in a file.

    Attributes:
      path: Local file.
      clips: {"clip_id", "video_uid", "start", "length", "samples", "label", "size_px"} of each record; start and length are
        its position in the file, bytes.
      rejects: {"clip_id", "video_uid", "reason", "detail"} of each reject.
      limits: Limits that caused rejects, see `limits_of`.
    """

    path: pathlib.Path
    clips: list[dict]
    rejects: list[dict]
    limits: dict


def key_of(item, settings: dict) -> str:
    """Returns the key of an item's piece: a hash of the item and of the settings that decide what the piece holds."""
    content = json.dumps([records.SCHEMA_VERSION, item, lasting(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def find(names: Iterable[str]) -> dict[str, str]:
    """Returns the pieces among some file names, as key → file name."""
    return {found["key"]: name for name in names if (found := re.fullmatch(NAME, name))}


def write(made: Iterable, path: pathlib.Path, settings: dict) -> Piece:
    """Writes clips and rejects into a local file and returns the piece.

    Args:
      made: `records.Clip`s and `shards.Reject`s.
      path: File to write.
      settings: Settings that clips and rejects were made with.
    """
    clips, rejects = [], []
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        for one in made:
            if not isinstance(one, records.Clip):
                rejects.append(dataclasses.asdict(one))
                continue
            record = records.encode(one)
            clips.append(
                {"clip_id": one.clip_id, "video_uid": one.video_uid, "start": file.tell(), "length": len(record),
                 "samples": len(one.audio), "label": one.label, "size_px": [one.frame_height, one.frame_width]}
            )  # fmt: skip
            put(record)
        limits = limits_of(rejects, settings)
        index = json.dumps([clips, rejects, limits]).encode()
        put(index + len(index).to_bytes(8, "little"))
        file.write(digest.digest())
    return Piece(path, clips, rejects, limits)


def read(path: pathlib.Path) -> Piece | None:
    """Returns the piece in a local file, or None if the file is incomplete or damaged."""
    length = path.stat().st_size - 32
    if length < 8:
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = length
        while left:
            part = file.read(min(left, 1 << 20))
            digest.update(part)
            left -= len(part)
        if file.read() != digest.digest():
            return None
        file.seek(length - 8)
        num_bytes = int.from_bytes(file.read(8), "little")
        file.seek(length - 8 - num_bytes)
        return Piece(path, *json.loads(file.read(num_bytes)))


def name_of(key: str, piece: Piece) -> str:
    """Returns the name of a piece's file."""
    return f"{key}-{len(piece.clips)}-{len(piece.rejects)}.piece"


def lasting(settings: dict) -> dict:
    """Returns the settings that decide what a piece holds: all but `PASSING`."""
    return {key: value for key, value in settings.items() if key not in PASSING}


def limits_of(rejects: list[dict], settings: dict) -> dict:
    """Returns name → value of the limits that caused rejects; {} if none did, so that not every report holds them."""
    names = {_LIMITS.get(reject["reason"]) for reject in rejects}
    return {name: settings[name] for name in sorted(filter(None, names)) if name in settings}


def is_final(rejects: list[dict], limits: dict, settings: dict) -> bool:
    """Returns whether the same rejects must be expected if an item were made again.

    Args:
      rejects: Rejects of one or more items.
      limits: Limits that caused some of them, as they were then; see `limits_of`.
      settings: Settings of the present run.
    """
    if any(reject["reason"] == streams.UNREADABLE for reject in rejects):
        return False
    return not any(np.any(np.asarray(settings[name]) > was) for name, was in limits.items() if name in settings)


def make(item, settings: dict, make_clips, folder: storage.Path, known: dict[str, str], local: pathlib.Path) -> Piece:
    """Returns an item's piece: the existing one if it is final (see `is_final`), or else a new one, added to the folder.

    Args:
      item, settings, make_clips: See `shards.write_shard`.
      folder: Folder of the pieces.
      known: Pieces in this folder, key → file name; see `find`.
      local: Local folder for copies if the pieces are in a bucket; otherwise `folder` itself.
    """
    key = key_of(item, settings)
    piece = _take(folder / known[key], local) if key in known else None
    if piece is not None:
        if is_final(piece.rejects, piece.limits, settings):
            return piece
        storage.remove(folder / known[key])  # the new piece may have another name, with other counts
    aside = storage.aside_of(local / f"{key}.piece")
    try:
        with storage.filling(local):
            piece = write(make_clips(item, settings), aside, settings)
        path = folder / name_of(key, piece)
        storage.publish(aside, path)
        return piece if storage.is_remote(folder) else dataclasses.replace(piece, path=path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _take(path: storage.Path, local: pathlib.Path) -> Piece | None:
    try:
        if not storage.is_remote(path):
            return read(path)
        copy = local / path.name
        copy.write_bytes(storage.read(path))
        return read(copy)
    except FileNotFoundError:  # another worker made the same item, finished and removed its piece
        return None
