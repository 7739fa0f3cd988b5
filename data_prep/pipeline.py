"""Shards by Beam: it maps over their names, moves no payload, and runs on all local cores or, by its own options, elsewhere.

What a shard is made of lies in a plan, one JSON file a shard inside the data set's folder, so that a job's graph stays small
however many annotations there are.
"""

import builtins
import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from data_prep import progress, shards, storage


def run(
    tasks: list[shards.ShardTask], folder: str, name: str, make_clips: shards.MakeClips, settings: dict, num_workers: int,
    beam_args: list[str],
) -> Iterator[dict]:  # fmt: skip
    """Writes all shards and returns their reports, which are read one after the other.

    Args:
      tasks: Shards to write.
      folder, name, make_clips, settings: As for `shards.write_shard`.
      num_workers: Local processes.
      beam_args: Beam's own options, e.g. `--runner=DataflowRunner`; empty is the local runner on all cores.

    Raises:
      ValueError: A shard can't be written or is not there in the end, or the folder holds another data set.
      OSError: A disk or bucket fails.
    """
    home = storage.as_path(folder)
    shards.prepare(home, name)
    planned = _plan(tasks, home, name, settings)
    stale = [file for (file, _), report in zip(planned, _reports(home, planned), strict=True) if report is None]
    # While shards change, whoever opens the folder must not take it for the finished data set that it was.
    for path in [home / file for file in shards.INDEX_FILES if stale] + [
        home / shards.REPORTS / f"{file}.json" for file in stale
    ]:
        storage.remove(path)
    is_local = not beam_args
    if is_local:
        # Named, because the default runner of recent Beams fetches a binary when it starts.
        mode = "multi_processing" if num_workers > 1 else "in_memory"
        beam_args = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
                     f"--direct_running_mode={mode}", f"--direct_num_workers={num_workers}"]  # fmt: skip
    try:
        with contextlib.ExitStack() as around:
            if is_local:
                around.enter_context(progress.watch(tasks, home, name, settings))
                around.enter_context(_options_of_local_workers())
                # Where Beam prints tracebacks that the error it raises holds as well.
                around.enter_context(contextlib.redirect_stderr(io.StringIO()))
            pipeline = around.enter_context(beam.Pipeline(options=PipelineOptions(beam_args)))
            build(pipeline, planned, folder, name, make_clips, settings.get("scratch", ""))
    except (RuntimeError, ValueError, OSError) as error:
        raise _unwrap(error) from error
    return _all_reports(home, planned)


def build(
    pipeline: beam.Pipeline, planned: list[tuple[str, str]], folder: str, name: str, make_clips: shards.MakeClips,
    scratch: str,
) -> None:  # fmt: skip
    """Adds the writing of all shards to a pipeline; `planned` is (file, fingerprint of its plan) of each."""
    # Without the reshuffle, one worker would get all shards fused behind Create.
    _ = (
        pipeline
        | "Shards" >> beam.Create(planned)
        | "Spread" >> beam.Reshuffle()
        | "Write" >> beam.Map(_write, folder, name, make_clips, scratch)
    )


def _plan(
    tasks: list[shards.ShardTask], home: storage.Path, name: str, settings: dict
) -> list[tuple[str, str]]:
    """Writes the plans; returns (file, fingerprint) of each shard, large ones first, so that no worker ends with one."""
    storage.make_folder(home / shards.PLANS)

    def write(task: shards.ShardTask) -> tuple[int, str, str]:
        plan = shards.plan_of(task, settings)
        storage.write(home / shards.PLANS / f"{task.file(name)}.json", plan.encode())
        return -len(plan), task.file(name), shards.fingerprint(plan)

    return [(file, fingerprint) for _, file, fingerprint in sorted(storage.each(write, tasks, home))]


def _reports(home: storage.Path, planned: list[tuple[str, str]]) -> Iterator[dict | None]:
    return storage.each(lambda entry: shards.read_report(home, *entry), planned, home)


def _all_reports(home: storage.Path, planned: list[tuple[str, str]]) -> Iterator[dict]:
    planned = sorted(planned)
    for (file, _), report in zip(planned, _reports(home, planned), strict=True):
        if report is None:
            raise ValueError(f"shard {file} was not written though the pipeline says it is done")
        yield report


def _write(planned: tuple[str, str], folder: str, name: str, make_clips: shards.MakeClips, scratch: str) -> None:
    """Writes one shard on a worker, and counts for Beam's own display."""
    file, fingerprint = planned
    plan = storage.read(storage.as_path(folder) / shards.PLANS / f"{file}.json").decode()
    if shards.fingerprint(plan) != fingerprint:
        raise ValueError(f"the plan of {file} is another one: does a conversion with other options run in {folder}?")
    task, settings = shards.read_plan(plan)
    report = shards.write_shard(task, folder, name, make_clips, settings | {"scratch": scratch})
    counts = {"clips": report["num_clips"], "rejects": len(report["rejects"]), "videos": len(task.items), "shards": 1}
    for what, count in counts.items():
        Metrics.counter("data_prep", what).inc(count)


@contextlib.contextmanager
def _options_of_local_workers() -> Iterator[None]:
    """Keeps local workers from reporting how they start, stop and fail, and from living on without their launcher.

    How they fail is in the error that the pipeline raises. The local runner passes them no options; they read them from the
    file that this variable names.
    """
    logger = logging.getLogger("apache_beam")
    level = logger.level
    with storage.scratch_folder() as folder:
        path = folder / "options.json"
        options = {"default_sdk_harness_log_level": "CRITICAL", "beam_plugins": ["data_prep.worker"]}
        path.write_text(json.dumps({"options": options}))
        before = os.environ.get("PIPELINE_OPTIONS_FILE")
        os.environ["PIPELINE_OPTIONS_FILE"] = str(path)
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
            del os.environ["PIPELINE_OPTIONS_FILE"]
            if before is not None:
                os.environ["PIPELINE_OPTIONS_FILE"] = before


def _unwrap(error: Exception) -> Exception:
    """Returns a worker's ValueError or OSError as one line; of anything else, Beam's error with the worker's traceback."""
    last = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    # Beam's own words stand at the end, or in the middle where the error has several arguments.
    found = re.fullmatch(r"(?:RuntimeError: )?(\w+): (.*)", re.sub(r" \[while running '[^']*'\]", "", last))
    kind = getattr(builtins, found[1], None) if found else None
    if isinstance(kind, type) and issubclass(kind, ValueError | OSError):
        return ValueError(f"a worker failed: {found[2]}")
    return error
