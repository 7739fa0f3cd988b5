"""Pieces of a shard: the clips and rejects of one item in a file of their own, so that a killed run loses one video, no more.

A file is named by the hash of what it is made of, whatever shard or worker that falls to, and by its counts, so that a
listing tells how far a run is. Layout: records; the index as JSON; its length, 8 bytes; the SHA-256 of all that, 32 bytes.

What was left out for a reason that lies outside the item is tried again when a conversion is started again: what a machine
could not read always, what a limit ended when that limit is higher now.
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

FOLDER = "spool"  # inside the data set; empty when a conversion is done
NAME = r"(?P<key>[0-9a-f]{32})-(?P<num_clips>\d+)-(?P<num_rejects>\d+)\.piece"

# Settings that say where and how something is made, and leave what is made as it is. Media are known by their size and time.
PASSING = ("scratch", "video_dir", "media_dir", "cpu_limit_s", "memory_limit_mb")
_LIMITS = {guard.TOOK_TOO_LONG: "cpu_limit_s", streams.OUT_OF_MEMORY: "memory_limit_mb"}  # by the reason they give


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an item gave.

    Attributes:
      path: Local file.
      clips: {"clip_id", "video_uid", "start", "length", "samples", "label", "size_px"} of each record.
      rejects: {"clip_id", "video_uid", "reason", "detail"} of each reject.
      limits: See `limits_of`.
    """

    path: pathlib.Path
    clips: list[dict]
    rejects: list[dict]
    limits: dict


def key_of(item, settings: dict) -> str:
    """Returns the name of what `make_clips` makes of an item."""
    content = json.dumps([records.SCHEMA_VERSION, item, lasting(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def find(names: Iterable[str]) -> dict[str, str]:
    """Returns key → file name of the pieces among the names."""
    return {found["key"]: name for name in names if (found := re.fullmatch(NAME, name))}


def write(made: Iterable, path: pathlib.Path, settings: dict) -> Piece:
    """Writes clips and rejects into a local file.

    Args:
      made: `records.Clip`s and `shards.Reject`s.
      path: Of the file.
      settings: They were made with.
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
    """Returns the piece in a local file, None where it is not whole."""
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
    """Returns the settings that decide what is made, all but `PASSING`."""
    return {key: value for key, value in settings.items() if key not in PASSING}


def limits_of(rejects: list[dict], settings: dict) -> dict:
    """Returns those of the limits that caused rejects: {} where none did, so that they don't stand in every report."""
    names = {_LIMITS.get(reject["reason"]) for reject in rejects}
    return {name: settings[name] for name in sorted(filter(None, names)) if name in settings}


def is_final(rejects: list[dict], limits: dict, settings: dict) -> bool:
    """Returns whether making an item again would leave out the same for all that is known.

    Args:
      rejects: Of the item, or of several.
      limits: See `limits_of`; as they were.
      settings: As they are.
    """
    if any(reject["reason"] == streams.UNREADABLE for reject in rejects):
        return False
    return not any(np.any(np.asarray(settings[name]) > was) for name, was in limits.items() if name in settings)


def make(item, settings: dict, make_clips, folder: storage.Path, known: dict[str, str], local: pathlib.Path) -> Piece:
    """Returns an item's piece: the one that is there and final, or else a new one, which is there from now on.

    Args:
      item, settings, make_clips: See `shards.write_shard`.
      folder: Of the pieces.
      known: Those in it; see `find`.
      local: Folder for copies of pieces that are in a bucket; else the same folder.
    """
    key = key_of(item, settings)
    piece = _take(folder / known[key], local) if key in known else None
    if piece is not None:
        if is_final(piece.rejects, piece.limits, settings):
            return piece
        storage.remove(folder / known[key])  # its name may be another than the new one's
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
    except FileNotFoundError:  # another worker was at the same item and is done
        return None
