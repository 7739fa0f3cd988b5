"""Which tokenizer a text tower was trained with, and where to find it: with any other, its embeddings are nonsense.

A run records the SHA-256 of its tokenizer in `data.json` and keeps a copy of it in `tokenizer/`. A folder of
`mc3_jax.convert` contains one and records its SHA-256 in `config.json`. Those of earlier versions may lack all of these.
"""

import os
import pathlib
import shutil

from mc3_jax import job as job_lib, weights, workdir as workdir_lib
from mc3_jax.data import tokenizer as tokenizer_lib
from mc3_jax.models import checkpoint_files

COPY = "tokenizer"  # in a run's workdir
DIGESTS = "tokenizer_sha256"  # in a folder's `config.json`


def learned(path: str) -> list[str]:
    """Returns the SHA-256 of each tokenizer that a text tower may be used with; [] where that is not recorded.

    Args:
      path: As for `weights.read_checkpoint`.

    Raises:
      ValueError: The file that records it is damaged.
    """
    if weights.is_own_folder(path):
        known = checkpoint_files.read_config(path).get(DIGESTS, [])
        if not isinstance(known, list) or not all(isinstance(digest, str) for digest in known):
            raise ValueError(f"{path}/{weights.CONFIG_FILE}: {DIGESTS} must be a list of strings, got {known!r:.80}")
        return known
    return _noted(path) if weights.is_run(path) else []


def _noted(workdir: str) -> list[str]:
    known = workdir_lib.trained_on(workdir).get("data.tokenizer")
    return [known] if isinstance(known, str) else []


def _is_one_of(folder: str, known: list[str]) -> bool:
    """Returns whether a folder's tokenizer has one of the known digests; if none is known, whether it holds any."""
    if not folder or not pathlib.Path(folder).is_dir():
        return False
    return tokenizer_lib.tokenizer_digest(folder) in known if known else tokenizer_lib.holds_tokenizer(folder)


def own(path: str) -> str:
    """Returns the folder of the tokenizer that came with a text tower; "" if it had none, or if it was removed or replaced.

    Args:
      path: As for `weights.read_checkpoint`.
    """
    folders, known = [path], learned(path)
    if weights.is_run(path):
        folders = [str(pathlib.Path(path) / COPY), weights.read_run_config(path).data.tokenizer]
    return next((folder for folder in folders if _is_one_of(folder, known)), "")


def find(path: str, named: str = "") -> str:
    """Returns the folder of the tokenizer that a text tower was trained with; "" if it has none or it can't be found.

    Args:
      path: As for `weights.read_checkpoint`.
      named: Folder to use; "" uses the tokenizer that came with the tower.

    Raises:
      ValueError: `named` is not the tower's tokenizer, or the one in a folder of `mc3_jax.convert` has been changed.
    """
    known = learned(path)
    if not named:
        if known and tokenizer_lib.holds_tokenizer(path) and not _is_one_of(path, known):
            raise ValueError(f"the tokenizer in {path} has changed since the export: export again, or name the original")
        return own(path)
    if not known or _is_one_of(named, known):
        return named
    empty = "" if tokenizer_lib.holds_tokenizer(named) else " (a folder without a tokenizer)"
    mine = own(path)
    fix = f"that one is in {mine}" if mine else f"name that one, also for other data; its SHA-256 is {known[0]}"
    raise ValueError(f"{named}{empty} is not the tokenizer that the text tower of {path} was trained with: {fix}")


def why_none(path: str) -> str:
    """Returns the reason why `find` found no tokenizer; "" if the text tower never had one."""
    if weights.is_run(path) and (named := weights.read_run_config(path).data.tokenizer):
        return f"the tokenizer of {path} is gone: {named} is missing or has changed"
    return f"the tokenizer of {path} is gone" if learned(path) else ""


def name_for_training(workdir: str, named: str) -> str:
    """Returns the tokenizer folder to train with: the one named, or the run's own copy if that no longer exists."""
    copy = str(pathlib.Path(workdir) / COPY)
    known = _noted(workdir)
    return copy if known and named and not pathlib.Path(named).exists() and _is_one_of(copy, known) else named


def keep(workdir: str, folder: str) -> None:
    """Copies the tokenizer of a run into its workdir, unless the copy exists; must be called by every process.

    Args:
      workdir: Workdir of the run, locked and claimed.
      folder: Folder of the tokenizer, which has been compared with the run's.

    Raises:
      WorkdirError: The copy can't be written; raised on every process.
    """
    place = pathlib.Path(workdir) / COPY

    def copy():
        digest = tokenizer_lib.tokenizer_digest(folder)
        if not tokenizer_lib.holds_tokenizer(folder) or _is_one_of(str(place), [digest]):
            return
        aside = place.with_suffix(".tmp")
        for old in (aside, place):  # left by a start that was killed, or damaged
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir()
        tokenizer_lib.copy_tokenizer(folder, aside)
        for path in (*aside.iterdir(), aside):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        aside.rename(place)

    try:
        job_lib.on_process_0(copy)
    except job_lib.Process0Error as error:
        raise workdir_lib.WorkdirError(
            f"{place} can't be written ({error}): free some space there, or name another --workdir"
        ) from error
