"""Reads your own CSV about a folder of video files: columns video, time_s, text and, if there are labels, label.

    video,time_s,text,label
    monday/kitchen,12.5,chops the onion,1
    garage.mkv,3,picks up a wrench,

`video` is a file name relative to the folder, with or without suffix. Texts need no tags such as "#C C" to say who acts:
all rows are used.
"""

import functools

from data_prep import storage, video_files
from data_prep.narrations import Narration, read_splits
from data_prep.sources import files

_COLUMNS = {"video", "time_s", "text"}


def read(path: storage.Path, video_dir: storage.Path) -> list[Narration]:
    """Returns a narration for every row, in the file's order; `video_uid` is the video file's path inside the folder.

    Rows without a time or text are kept, so that the caller can count them. So are rows whose video is missing or can't
    be used, with the reason as their `problem`.

    Raises:
      ValueError: As `files.read_csv`; also for a table without rows, a column that nothing reads, a time that is not a
        number, or a label other than 1, 0 or empty.
    """
    found: list[Narration] = []
    find = functools.cache(video_files.finder(video_dir))
    for number, row in files.read_csv(path, _COLUMNS):
        where = f"{path}, row {number}"
        unknown = sorted(set(row) - _COLUMNS - {"label"})
        if unknown:  # it may be a misspelt label
            raise ValueError(
                f"{path} has the unknown column {unknown[0]!r}: only video, time_s, text and label are read, remove it"
            )
        text = row["text"]
        uid, problem = find(row["video"])
        time_s = files.seconds(row["time_s"].strip() or None, f"{where}: time_s")
        label = files.label(row.get("label", ""), f"{where}: label")
        found.append(Narration(uid, "", "own_csv", time_s, text, label, problem=problem))
    if not found:
        raise ValueError(f"{path} has no rows below the names of its columns: add one for each narration")
    return found


def read_own_splits(path: storage.Path, video_dir: storage.Path) -> tuple[dict[str, str], list[str]]:
    """Returns uid → split from a CSV with columns video_uid and split, and the names in it whose file is missing.

    Raises:
      ValueError: As `narrations.read_splits`; also for a name that can't be a video's, or a video that is in two splits under
        two names.
    """
    splits: dict[str, str] = {}
    missing, find = [], video_files.finder(video_dir)
    for name, split in read_splits(path).items():
        uid, problem = find(name)
        if problem == video_files.MISSING:
            missing.append(name)
            continue
        if problem:
            raise ValueError(f"{path}: video {name!r}: {problem}")
        if splits.setdefault(uid, split) != split:
            raise ValueError(f"{path}: video {name!r} is {uid}, in {split!r} here and in {splits[uid]!r} under another name")
    return splits, missing
