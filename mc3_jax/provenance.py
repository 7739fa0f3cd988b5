"""Provenance of a run's start: its command, machine, versions, the revision of the code and XLA's flags."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jaxlib

import mc3_jax

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = "benchmarks/RESULTS.md"
_GIT_LIMIT_S = 10  # a hanging file system must not keep a run from starting


def facts() -> dict:
    """Returns the provenance as plain values. `revision` is from `_revision`; it is missing if that returns ""."""
    revision = _revision(ROOT)
    return {
        "argv": sys.orig_argv, "host": socket.gethostname(), "python": ".".join(map(str, sys.version_info[:3])),
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "mc3_jax": mc3_jax.__version__,
        **({"revision": revision} if revision else {}), "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def _revision(root: pathlib.Path) -> str:
    """Returns the commit that is checked out in a folder; "" if it is no checkout or git fails.

    "-dirty" is appended if tracked files were changed, other than the benchmarks' results, which are no code.
    """
    if not (root / ".git").exists():  # else git would find a project in a folder above
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}-dirty" if changed else commit


def _git(root: pathlib.Path, *words: str) -> str:
    """Returns git's output for a checkout; GIT_* variables of this process, which may name another one, are ignored."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "--no-optional-locks", *words]
    return subprocess.run(
        command, env=outside, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_GIT_LIMIT_S
    ).stdout.strip()
