"""Writes shards by Beam, on all local cores or, with Beam's own options, elsewhere.

Beam only maps over the shards' names, or over local workers that find the names themselves, and moves no payload. What goes
into a shard stands in its plan, one JSON file per shard inside the data set's folder, so that the job's graph stays small
however many annotations there are.
"""

import argparse
import builtins
import difflib
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator

import grpc

from data_prep import local_runner, pieces, progress, quiet, shards, storage

with quiet.beam():
    import apache_beam as beam
    from apache_beam.metrics import Metrics
    from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions

_ANSWER_S = 60.0  # how long to wait for a job server or Docker


class _BeamParser(argparse.ArgumentParser):
    """A parser of Beam's options that raises ValueError for a wrong one instead of ending the process."""

    add_value_provider_argument = argparse.ArgumentParser.add_argument

    def error(self, message: str):
        raise ValueError(f"Beam's options: {message}")


def check_names(beam_args: list[str], ours: list[str]) -> None:
    """Checks that Beam knows all of these options: it would silently drop others and run with defaults.

    Args:
      beam_args: Options as they will be given to Beam.
      ours: Names of this command's own options, to suggest one for a misspelt option.

    Raises:
      ValueError: Beam does not know one of the options or does not accept its value.
    """
    parser = _BeamParser(add_help=False, allow_abbrev=False)
    for kind in PipelineOptions.__subclasses__():
        kind._add_argparse_args(parser)
    options, left = parser.parse_known_args(beam_args)
    elsewhere = options.job_endpoint not in (None, "embed")  # a job server may have options of its own
    for i, word in enumerate(left):
        if not word.startswith("-"):
            if i == 0:
                raise ValueError(f"{word!r} does not belong to an option")
            continue
        name = word.split("=")[0]
        close = difflib.get_close_matches(name, [*ours, *parser._option_string_actions], 1, 0.75)
        if close or not elsewhere:
            hint = f"did you mean {close[0]}?" if close else "neither this command nor Beam has it"
            raise ValueError(f"unknown option {name}: {hint}")


def check_place(beam_args: list[str]) -> None:
    """Checks that the job server or Docker that the workers need is running; Beam would wait for it silently.

    Raises:
      ValueError: The job server does not answer, or Docker does not where it is needed.
    """
    options = PipelineOptions(beam_args).view_as(PortableOptions)
    endpoint = options.job_endpoint
    if endpoint == "embed":
        if (options.environment_type or "DOCKER").upper() == "DOCKER" and not _docker_answers():
            raise ValueError(
                "--job_endpoint=embed runs workers in Docker, which does not answer: start it or add "
                "--environment_type=LOOPBACK"
            )
    elif endpoint:
        given = any(re.match("--job[_-]server[_-]timeout", arg) for arg in beam_args)
        channel = grpc.insecure_channel(endpoint)
        try:
            grpc.channel_ready_future(channel).result(options.job_server_timeout if given else _ANSWER_S)
        except grpc.FutureTimeoutError:
            raise ValueError(f"no job server answers at {endpoint}: start it or name another --job_endpoint") from None
        finally:
            channel.close()


def _docker_answers() -> bool:
    try:
        subprocess.run(["docker", "version"], capture_output=True, timeout=_ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def run(
    tasks: list[shards.ShardTask], folder: str, name: str, make_clips: shards.MakeClips, settings: dict, num_workers: int,
    beam_args: list[str],
) -> Iterator[dict]:  # fmt: skip
    """Writes all shards and returns an iterator over their reports, which reads each report only when it is asked for.

    Args:
      tasks: Shards to write.
      folder, name, make_clips, settings: As for `shards.write_shard`.
      num_workers: Number of local processes.
      beam_args: Beam's own options, e.g. `--runner=DataflowRunner`; without any, the local runner with `num_workers`.

    Raises:
      ValueError: A shard can't be written or is missing at the end, or the folder holds another data set.
      OSError: A disk or bucket fails, or a local worker died.
    """
    home = storage.as_path(folder)
    shards.prepare(home, name)
    planned = _plan(tasks, home, name, settings)
    passing = {key: settings[key] for key in pieces.PASSING if key in settings}
    stale = _stale(home, planned, settings)
    # While shards change, the folder must not look like the finished data set that it was before.
    for path in [home / file for file in shards.INDEX_FILES if stale] + [
        home / shards.REPORTS / f"{file}.json" for file in stale
    ]:
        storage.remove(path)

    try:
        if beam_args:
            with storage.temporary_files(), beam.Pipeline(options=PipelineOptions(beam_args)) as elsewhere:
                build(elsewhere, planned, folder, name, make_clips, passing)
        else:
            with progress.watch(tasks, home, name, settings), storage.scratch_folder() as claims:

                def add(to: beam.Pipeline) -> None:
                    _build_local(to, num_workers, str(claims), planned, folder, name, make_clips, passing)

                local_runner.run(add, num_workers)
    except local_runner.WorkerError:
        raise
    except subprocess.CalledProcessError as error:
        raise ValueError(f"Beam could not start a worker: {error}") from error
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        raise _unwrap(error) from error
    return _all_reports(home, planned)


def build(
    pipeline: beam.Pipeline, planned: list[tuple[str, str]], folder: str, name: str, make_clips: shards.MakeClips,
    passing: dict,
) -> None:  # fmt: skip
    """Adds the steps that write all shards to a pipeline.

    Args:
      pipeline: Pipeline to extend.
      planned: (file, fingerprint of its plan) of each shard.
      folder, name, make_clips: As for `run`.
      passing: Settings that are not part of the plans, see `pieces.PASSING`.
    """
    # Without the reshuffle, Beam would fuse the steps and give all shards to one worker.
    _ = (
        pipeline
        | "Shards" >> beam.Create(planned)
        | "Spread" >> beam.Reshuffle()
        | "Write" >> beam.Map(_write, folder, name, make_clips, passing)
    )


def _build_local(pipeline: beam.Pipeline, num_workers: int, *args) -> None:
    """Adds the steps by which each local worker runs `_write_claimed` with these arguments.

    Beam's local runner deals values out before any work begins, in turn and in no particular order. One shard that takes
    long would hold up all others in its worker's list. So each worker gets a single value here and finds its shards itself.
    """
    _ = (
        pipeline
        | "Workers" >> beam.Create(range(num_workers))
        | "Spread" >> beam.Reshuffle()
        | "Write" >> beam.Map(_write_claimed, *args)
    )


def _write_claimed(worker: int, claims: str, planned: list[tuple[str, str]], *args) -> None:
    """Writes in turn each shard that no other worker has claimed, until none is left or a worker has failed.

    Args:
      worker: Number of the worker.
      claims: Local folder with a file for each claimed shard, and one named "failed" after an error.
      planned: (file, fingerprint of its plan) of each shard, in the order in which they are claimed.
      *args: Other arguments of `_write`.
    """
    failed = pathlib.Path(claims) / "failed"
    for number, shard in enumerate(planned):
        if failed.exists():  # Beam may report the error only when all workers are done
            return
        try:
            failed.with_name(str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            _write(shard, *args)
        except BaseException:
            failed.touch()
            raise


def _plan(
    tasks: list[shards.ShardTask], home: storage.Path, name: str, settings: dict
) -> list[tuple[str, str]]:
    """Writes the plans and returns (file, fingerprint) of each shard, large ones first.

    Local workers claim them in this order, so that no large one is left for the end.
    """
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
            raise ValueError(f"shard {file} was not written though Beam reports success: run the same command again")
        yield report


def _stale(home: storage.Path, planned: list[tuple[str, str]], settings: dict) -> list[str]:
    """Returns the files of the shards that must be written, and prints how many exist and how many are redone."""
    known = set(storage.names(home / shards.REPORTS))
    missing, again = [], []
    for (file, _), report in zip(planned, _reports(home, planned), strict=True):
        if report is None:
            missing.append(file)
        elif not pieces.is_final(report["rejects"], report.get("limits", {}), settings):
            again.append(file)
    changed = sum(f"{file}.json" in known for file in missing)
    there = len(planned) - len(missing) - len(again)
    if there or changed or again:
        told = [f"{there} of {len(planned)} shards exist"]
        told += [f"{changed} to redo (settings, videos or files changed)"] * bool(changed)
        told += [f"{len(again)} to retry (videos could not be read, or limits were raised)"] * bool(again)
        print(", ".join(told), flush=True)
    return missing + again


def _write(planned: tuple[str, str], folder: str, name: str, make_clips: shards.MakeClips, passing: dict) -> None:
    """Writes one shard on a worker, and adds its counts to Beam's metrics."""
    file, fingerprint = planned
    plan = storage.read(storage.as_path(folder) / shards.PLANS / f"{file}.json").decode()
    if shards.fingerprint(plan) != fingerprint:
        raise ValueError(f"the plan of {file} has changed: is a conversion with other options running in {folder}?")
    task, settings = shards.read_plan(plan)
    report = shards.write_shard(task, folder, name, make_clips, settings | passing)
    counts = {"clips": report["num_clips"], "rejects": len(report["rejects"]), "videos": len(task.items), "shards": 1}
    for what, count in counts.items():
        Metrics.counter("data_prep", what).inc(count)


def _unwrap(error: Exception) -> BaseException:
    """Returns an error of one line for a worker's bad value, failed disk or lack of memory; else Beam's, with its traceback.

    Ctrl-C becomes KeyboardInterrupt again.
    """
    last = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    # Beam adds its own words at the end, or in the middle if the error has several arguments.
    last = re.sub(r" \[while running '[^']*'\]", "", last)
    found = re.fullmatch(r"(?:RuntimeError: )?(?:[\w.]+\.)?(\w+)(?:: (.*))?", last)
    if found is None:
        return error
    if found[1] == "KeyboardInterrupt":
        return KeyboardInterrupt()
    if found[1].endswith("MemoryError"):  # numpy has one of its own, _ArrayMemoryError
        return ValueError(f"a worker had too little memory ({found[2] or found[1]}): use fewer --num_workers")
    kind = getattr(builtins, found[1], None)
    if isinstance(kind, type) and issubclass(kind, ValueError | OSError) and found[2]:
        outside = kind is ChildProcessError or any(os.strerror(number) in found[2] for number in storage.FULL)
        return ValueError(f"a worker failed: {found[2]}" + (f". {local_runner.GOES_ON}" if outside else ""))
    return error
