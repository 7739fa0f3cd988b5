"""Reads EPIC-Sounds (Huh et al., ICASSP 2023; epic-kitchens/epic-sounds-annotations): segments of sound with a class.

    annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample,description,class,class_id
    P01_11_0,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,clang / clatter,ceramic / wood collision,34

Samples are counted at 24 kHz. The file of the test split has only the first five columns: no samples, no description, no
class.
"""

import re

from data_prep import storage
from data_prep.sounds import Sound
from data_prep.sources import files
from mc3_jax.data.records import UNKNOWN, unnamed_class

ANNOTATED_RATE_HZ = 24_000
FILES = {
    "EPIC_Sounds_train.csv": "train",
    "EPIC_Sounds_validation.csv": "validation",
    "EPIC_Sounds_recognition_test_timestamps.csv": "test",
}
_COLUMNS = {"annotation_id", "video_id", "start_timestamp", "stop_timestamp"}
_SAMPLES = {"start_sample", "stop_sample"}
_CLASSES = {"description", "class", "class_id"}
_VIDEO = "P[0-9]{2,3}_[0-9]{2,4}"
_AGREE_S = 0.001  # greatest difference between timestamp and sample; at most 0.05 ms in the public rows
_MAX_CLASS = 9999
_MAX_SAMPLE = 1 << 40


def find_files(paths: list[storage.Path]) -> list[storage.Path]:
    """Returns the annotation files among `paths`; for a folder, the files in it that have the public names.

    Raises:
      ValueError: A path does not exist, a folder holds no such file, or a file has another name, which tells no split.
    """
    found = []
    for path in paths:
        inside = [path]
        if not storage.is_file(path):
            if not storage.is_folder(path):
                raise ValueError(f"no file or folder {path}: point --annotations at {', '.join(FILES)} or their folder")
            inside = [path / name for name in FILES if storage.is_file(path / name)]
        if not inside:
            raise ValueError(f"{path} holds none of {', '.join(FILES)}: point --annotations at their folder")
        found += inside
    for path in found:
        if path.name not in FILES:
            raise ValueError(f"{path}: the file name determines the split and must be one of {', '.join(FILES)}")
    return found


def read(paths: list[storage.Path]) -> tuple[list[Sound], list[str]]:
    """Returns the sounds of all rows, in order, and the class names by id; an id that no row has is named like "class 7".

    Rows that can't become a clip are kept, with the reason as their `problem`.

    Args:
      paths: Annotation files, as `find_files` returns them.

    Raises:
      ValueError: As `files.read_csv`; also for a value that is not of its column's kind, a class id with two names, or a
        class name with two ids.
    """
    found: list[Sound] = []
    names: dict[int, str] = {}
    for path in paths:
        split = FILES[path.name]
        columns = _COLUMNS if split == "test" else _COLUMNS | _SAMPLES | _CLASSES
        for number, row in files.read_csv(path, columns):
            where = f"{path}, row {number}"
            class_id = UNKNOWN
            if row.get("class_id"):
                class_id = files.whole_number(row["class_id"], f"{where}: class_id", most=_MAX_CLASS)
                if names.setdefault(class_id, row["class"]) != row["class"]:
                    raise ValueError(f"{where}: class {class_id} is {row['class']!r} here but {names[class_id]!r} before")
            start_s, stop_s, problem = _segment(row, where)
            if not re.fullmatch(_VIDEO, row["video_id"]):
                problem = f"video name is not one of EPIC-Kitchens: {row['video_id']!r:.40}"
            elif class_id == UNKNOWN and split != "test":
                problem = "annotation has no class"
            found.append(
                Sound(
                    row["annotation_id"], row["video_id"], row.get("description", ""), "epic_sounds", split, start_s, stop_s,
                    class_id, problem=problem,
                )
            )  # fmt: skip
    doubles = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if doubles:
        raise ValueError(f"class {doubles[0]!r} has several ids: {sorted(i for i in names if names[i] == doubles[0])}")
    return found, [names.get(i, unnamed_class(i)) for i in range(max(names, default=-1) + 1)]


def _segment(row: dict[str, str], where: str) -> tuple[float, float, str]:
    """Returns (start, stop, problem) of a row, seconds, from its samples where it has any; "" if there is no problem."""
    times = [_seconds(row[key], f"{where}: {key}") for key in ("start_timestamp", "stop_timestamp")]
    problem = ""
    if row.get("start_sample") and row.get("stop_sample"):
        stamps = times
        times = [
            files.whole_number(row[key], f"{where}: {key}", most=_MAX_SAMPLE) / ANNOTATED_RATE_HZ
            for key in ("start_sample", "stop_sample")
        ]
        apart_s = max(abs(a - b) for a, b in zip(times, stamps, strict=True))
        if apart_s > _AGREE_S:
            problem = f"time stamps and samples differ: by {apart_s:.3f} s"
    if times[1] <= times[0]:
        problem = "segment is empty"
    return times[0], times[1], problem


def _seconds(value: str, where: str) -> float:
    """Returns a timestamp such as "00:00:02.069" in seconds.

    Raises:
      ValueError: `value` is not a timestamp.
    """
    found = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d(?:\.\d{1,9})?)", value.strip(), re.ASCII)
    if not found:
        raise ValueError(f"{where} must be HH:MM:SS.sss, got {value!r:.60}")
    hours, minutes, seconds = found.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
