"""Writes a benchmark's results to RESULTS.md, under the command, the machine and the versions that gave them."""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Sequence

import jax

from mc3_jax import provenance

RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"
# Environment variables that are told beside a command if they are set. Memory kept by malloc is told in the text.
_TOLD = (
    "CUDA_VISIBLE_DEVICES", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "JAX_OPTIMIZATION_LEVEL", "OMP_NUM_THREADS",
    "XLA_FLAGS", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # fmt: skip


def machine() -> str:
    """Returns the number of cores, the processor, the memory and JAX's accelerators, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = jax.devices()
    found = f"{len(os.sched_getaffinity(0))} cores of {name}, {memory:.0f} GiB"
    return found if devices[0].platform == "cpu" else f"{found}; {len(devices)} x {devices[0].device_kind}"


def versions(*packages: str) -> str:
    """Returns the versions of Python, JAX and those of the named packages that are installed, in one line."""
    found = [f"Python {platform.python_version()}"]
    for package in ("jax", *packages):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def made_by() -> str:
    """Returns the command of this process without `--results`, and the commit of the code if it is known.

    The environment variables of `_TOLD` that are set stand before it, with "..." for paths in their values.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--results")
    words = parser.parse_known_args()[1]
    revision = provenance.facts().get("revision", "")
    commit = f", commit {revision[:7]}{'-dirty' * revision.endswith('-dirty')}" if revision else ""
    values = {name: re.sub(r"[^\s=,]*/[^\s,]*", "...", os.environ[name]) for name in _TOLD if os.environ.get(name)}
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in values.items())
    command = shlex.join(["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *words])
    return f"`{settings}{command}`{commit}"


def append(title: str, text: str, *packages: str, path: pathlib.Path | None = None) -> None:
    """Prints a result and appends it to RESULTS.md, with the command, its commit, the machine, the versions and the day.

    Args:
      title: Title of the section.
      text: Result, as Markdown.
      *packages: Packages whose versions are listed besides JAX's.
      path: File to append to instead of `RESULTS`; an empty path only prints.
    """
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    section = f"\n## {title}\n\n{made_by()}, {day}: {machine()}; {versions(*packages)}.\n\n{text}\n"
    print(section, flush=True)
    path = RESULTS if path is None else path
    if str(path) not in ("", "."):
        with path.open("a") as file:
            file.write(section)
