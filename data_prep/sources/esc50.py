"""Reads ESC-50 and ESC-10 (Piczak, ACM MM 2015): `meta/esc50.csv` and the recordings it names in `audio/`.

    filename,fold,target,category,esc10,src_file,take
    1-100032-A-0.wav,1,0,dog,True,100032,A

Cuts of one Freesound recording (`src_file`) share a fold. ESC-10 is either the rows of ESC-50 with `esc10` True, or a folder
of its own with `meta/esc10.csv`, which may lack the columns `esc10` and `take`.
"""

import pathlib

from data_prep import storage, video_files
from data_prep.sounds import Sound
from data_prep.sources import files

_COLUMNS = {"filename", "fold", "target", "category", "src_file"}
_MAX_NUMBER = 9999


def read(root: storage.Path, *, esc10: bool, test_fold: int, validation_fold: int) -> tuple[list[Sound], list[str]]:
    """Returns the sounds in the file's order, and the names of the classes, which are numbered from 0 in order of `target`.

    Rows whose sound file is missing are kept, with that as their `problem`.

    Args:
      root: Folder with `meta` and `audio`.
      esc10: Whether to read only the rows of ESC-10.
      test_fold, validation_fold: Fold that becomes each of these splits, 0 for none; all other folds are for training.

    Raises:
      ValueError: As `files.read_csv`; also for a value that is not of its column's kind, a class with two names, a file
        without rows, or a fold that no row has.
    """
    path = root / "meta" / "esc50.csv"
    own = root / "meta" / "esc10.csv"
    whole = not storage.is_file(path)
    if whole and not storage.is_file(own):
        raise ValueError(f"no file {path} or {own.name}: point --root at the folder of ESC-50 or ESC-10")
    columns = _COLUMNS if whole or not esc10 else _COLUMNS | {"esc10"}
    rows = []
    names: dict[int, str] = {}
    for number, row in files.read_csv(own if whole else path, columns):
        where = f"{own if whole else path}, row {number}"
        if esc10 and not whole:
            if row["esc10"] not in ("True", "False"):
                raise ValueError(f"{where}: esc10 must be True or False, got {row['esc10']!r:.60}")
            if row["esc10"] == "False":
                continue
        target = files.whole_number(row["target"], f"{where}: target", most=_MAX_NUMBER)
        if names.setdefault(target, row["category"]) != row["category"]:
            raise ValueError(f"{where}: class {target} is {row['category']!r} here but {names[target]!r} before")
        rows.append((row, target, files.whole_number(row["fold"], f"{where}: fold", least=1, most=_MAX_NUMBER)))
    if not rows:
        raise ValueError(f"{own if whole else path} has no rows" + (" of ESC-10" if esc10 else ""))
    splits = {test_fold: "test", validation_fold: "validation"}
    folds = {fold for _, _, fold in rows}
    for fold in sorted(set(splits) - folds - {0}):
        raise ValueError(f"no row is in the {splits[fold]} fold {fold}: the folds are {sorted(folds)}")
    class_id = {target: i for i, target in enumerate(sorted(names))}
    found, find = [], video_files.finder(root / "audio")
    for row, target, fold in rows:
        file, problem = find(row["filename"])
        if problem == video_files.MISSING:
            problem += f": {row['filename']}"
        found.append(
            Sound(
                clip_id=pathlib.PurePath(row["filename"]).stem, recording=row["src_file"], source="esc",
                text=row["category"].replace("_", " "), split=splits.get(fold, "train"), class_id=class_id[target], fold=fold,
                file=file, problem=problem,
            )
        )  # fmt: skip
    return found, [names[target] for target in sorted(names)]
