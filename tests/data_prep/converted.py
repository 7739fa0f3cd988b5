"""Reads a converted data set back, knowing nothing but its format."""

import collections
import json
import pathlib

from array_record.python.array_record_module import ArrayRecordReader

from mc3_jax.data import records


class Converted:
    """The content of a converted data set.

    Attributes:
      root: Folder that it was converted from.
      folder: Folder of the data set.
      info: Content of clips.json.
      splits: Name of a split → its clips.
      rejected: Rows of rejected.jsonl.
    """

    def __init__(self, root: pathlib.Path, folder: pathlib.Path):
        self.root, self.folder = root, folder
        self.info = records.ClipsInfo.load(folder)
        self.splits = {name: self._read(split) for name, split in self.info.splits.items()}
        self.rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]

    def _read(self, split: records.SplitInfo) -> list[records.Clip]:
        clips = []
        for shard in split.shards:
            reader = ArrayRecordReader(str(self.folder / shard.file))
            clips += [records.decode(record) for record in reader.read_all()]
            reader.close()
        return clips

    @property
    def clips(self) -> dict[str, records.Clip]:
        return {clip.clip_id: clip for clips in self.splits.values() for clip in clips}

    def reasons(self, uid: str | None = None) -> collections.Counter:
        return collections.Counter(row["reason"] for row in self.rejected if uid in (None, row["video_uid"]))
