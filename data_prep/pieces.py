"""Pieces of a shard: the clips and rejects of one item in a file of their own, so that a killed run loses one video, no more.

A file is named by the hash of what it is made of, whatever shard or worker that falls to, and by its counts, so that a
listing tells how far a run is. Layout: records; the index as JSON; its length, 8 bytes; the SHA-256 of all that, 32 bytes.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable

from data_prep import storage
from mc3_jax.data import records

FOLDER = "spool"  # inside the data set; empty when a conversion is done
NAME = r"(?P<key>[0-9a-f]{32})-(?P<num_clips>\d+)-(?P<num_rejects>\d+)\.piece"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an item gave.

    Attributes:
      path: Local file.
      clips: {"clip_id", "video_uid", "start", "length", "samples", "label", "size_px"} of each record.
      rejects: {"clip_id", "video_uid", "reason", "detail"} of each reject.
    """

    path: pathlib.Path
    clips: list[dict]
    rejects: list[dict]


def key_of(item, settings: dict) -> str:
    """Returns the name of what `make_clips` makes of an item."""
    content = json.dumps([records.SCHEMA_VERSION, item, lasting(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def find(names: Iterable[str]) -> dict[str, str]:
    """Returns key → file name of the pieces among the names."""
    return {found["key"]: name for name in names if (found := re.fullmatch(NAME, name))}


def write(made: Iterable, path: pathlib.Path) -> Piece:
    """Writes clips and rejects into a local file.

    Args:
      made: `records.Clip`s and `shards.Reject`s.
      path: Of the file.
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
        index = json.dumps([clips, rejects]).encode()
        put(index + len(index).to_bytes(8, "little"))
        file.write(digest.digest())
    return Piece(path, clips, rejects)


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
    """Returns the settings that decide what is made; where it is made is none of them."""
    return {key: value for key, value in settings.items() if key != "scratch"}


def make(item, settings: dict, make_clips, folder: storage.Path, known: dict[str, str], local: pathlib.Path) -> Piece:
    """Returns an item's piece: the one that is there, or else a new one, which is there from now on.

    Args:
      item, settings, make_clips: See `shards.write_shard`.
      folder: Of the pieces.
      known: Those in it; see `find`.
      local: Folder for copies of pieces that are in a bucket; else the same folder.
    """
    key = key_of(item, settings)
    piece = _take(folder / known[key], local) if key in known else None
    if piece is not None:
        return piece
    aside = storage.aside_of(local / f"{key}.piece")
    try:
        piece = write(make_clips(item, settings), aside)
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
