"""Shows the progress of a conversion from the files written so far: a bar on a terminal, otherwise one line per minute."""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from data_prep import pieces, shards, storage

# Seconds between looks at the files. Many jobs may look at the same folder, so nobody looks more often than it is shown.
_BAR_S, _REMOTE_BAR_S, _LINE_S = 5.0, 30.0, 60.0


class Count:
    """Counter of the clips and rejects in finished shards and in finished items of the other shards.

    Args:
      tasks: Shards to write.
      home, name: Folder and name of the data set.
      settings: See `shards.write_shard`.
    """

    def __init__(self, tasks: list[shards.ShardTask], home: storage.Path, name: str, settings: dict):
        self._home = home
        self._shard_of = {pieces.key_of(item, settings): task.file(name) for task in tasks for item in task.items}
        self._files = {task.file(name) for task in tasks}
        self._finished: dict[str, tuple[int, int]] = {}

    def look(self) -> tuple[int, int]:
        """Returns (number of clips, number of rejects) so far."""
        # Pieces are listed first, so that a shard that is finished between the two listings is counted once, by its report.
        found = [re.fullmatch(pieces.NAME, name) for name in storage.names(self._home / pieces.FOLDER)]
        for name in storage.names(self._home / shards.REPORTS):
            file = name.removesuffix(".json")
            if file in self._files and file not in self._finished:
                with contextlib.suppress(OSError, ValueError, KeyError):  # the report is just being replaced
                    report = json.loads(storage.read(self._home / shards.REPORTS / name))
                    self._finished[file] = (report["num_clips"], len(report["rejects"]))
        counts = list(self._finished.values())
        for piece in filter(None, found):
            file = self._shard_of.get(piece["key"])
            if file is not None and file not in self._finished:
                counts.append((int(piece["num_clips"]), int(piece["num_rejects"])))
        return sum(clips for clips, _ in counts), sum(rejects for _, rejects in counts)


@contextlib.contextmanager
def watch(tasks: list[shards.ShardTask], home: storage.Path, name: str, settings: dict) -> Iterator[None]:
    """Shows the progress of the shards while the block runs."""
    count, stop = Count(tasks, home, name, settings), threading.Event()
    total = sum(task.num_annotations for task in tasks)
    thread = threading.Thread(target=_tell, args=(count, total, stop, storage.is_remote(home), sys.stderr), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tell(count: Count, total: int, stop: threading.Event, remote: bool, stream) -> None:
    begin, begin_s, last, quiet = None, time.monotonic(), False, not stream.isatty()
    wait_s = _LINE_S if quiet else _REMOTE_BAR_S if remote else _BAR_S
    with tqdm(total=total, unit="clip", desc="convert", disable=quiet, file=stream) as bar:
        while True:
            with contextlib.suppress(OSError):  # if it lasts, the workers report it
                clips, rejects = count.look()
                if begin is None:
                    begin = bar.initial = clips + rejects
                bar.n = clips + rejects
                bar.set_postfix(rejected=rejects)
                elapsed_s = time.monotonic() - begin_s
                if quiet and elapsed_s >= _LINE_S:
                    print(line(clips, rejects, total, clips + rejects - begin, elapsed_s), file=stream)
            if last:
                return
            last = stop.wait(wait_s)


def line(clips: int, rejects: int, total: int, num_done: int, elapsed_s: float) -> str:
    """Returns the line of progress for logs.

    Args:
      clips, rejects: Numbers so far.
      total: Number of clips and rejects at the end.
      num_done: Clips and rejects since this run began.
      elapsed_s: Time since this run began, seconds.
    """
    rate = num_done / elapsed_s
    told = f"{clips + rejects:,} of {total:,} clips, {rejects:,} of them rejected, {rate:.1f} clips/s"
    return told + (f", {tqdm.format_interval((total - clips - rejects) / rate)} to go" if rate else "")
