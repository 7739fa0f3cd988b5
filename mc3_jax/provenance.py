"""What a start was made of: its command, machine, versions, the revision of the code and the flags of XLA."""

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
_GIT_LIMIT_S = 10  # a file system that hangs shall not keep a run from starting


def facts() -> dict:
    """Returns plain values; `revision`, the commit with "-dirty" behind it where files differ, of a checkout alone."""
    revision = _revision(ROOT)
    return {
        "argv": sys.orig_argv, "host": socket.gethostname(), "python": ".".join(map(str, sys.version_info[:3])),
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "mc3_jax": mc3_jax.__version__,
        **({"revision": revision} if revision else {}), "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def _revision(root: pathlib.Path) -> str:
    """Returns the commit that lies in a folder, or "" where it is no checkout or git can't tell.

    "-dirty" is behind it where files differ, other than the benchmarks' results, which are no code.
    """
    if not (root / ".git").exists():  # else git would look above it, at whatever project that is
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}-dirty" if changed else commit


def _git(root: pathlib.Path, *words: str) -> str:
    """Returns what git says of a checkout, whatever checkout this process was started for."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "--no-optional-locks", *words]
    return subprocess.run(
        command, env=outside, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_GIT_LIMIT_S
    ).stdout.strip()
