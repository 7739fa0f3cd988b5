"""Fakes of the programs that launch files call: they record their arguments and end as the test wants."""

import os
import pathlib

_PROGRAM = """#!/usr/bin/env bash
# The word of the command line that has a queue says which one is next; its last line stays.
cd {folder}
printf '%s ' {name} "$@" >>calls
echo >>calls
queue={name}
for word in "$@"; do [[ ! -e queue.{name}.$word ]] || queue={name}.$word; done
[[ -e queue.$queue ]] || exit 0
read -r status text <queue.$queue
(($(wc -l <queue.$queue) == 1)) || sed -i 1d queue.$queue
if [[ $text == "makes "* ]]; then
  mkdir -p "${{text#makes }}"
elif [[ -n $text ]]; then
  echo "$text"
fi
if [[ $status == until_term ]]; then
  trap 'exit 75' TERM
  while true; do sleep 0.05; done
fi
exit "$status"
"""


def make(folder: pathlib.Path, *names: str, **queues: list[str]) -> dict[str, str]:
    """Makes fake programs in `folder` and returns an environment that finds them first.

    Args:
      folder: Empty folder; the file `calls` in it will hold one line per call.
      *names: Names of the programs.
      **queues: How the calls of a program end, one entry per call; the last entry holds for all further calls. The key is
        the program's name, or name__word for calls with that word. An entry is "STATUS [OUTPUT]", "STATUS makes FOLDER" to
        make a folder first, or "until_term" to run until SIGTERM and end with 75. Programs without entries end with 0.
    """
    for name in names:
        program = folder / name
        program.write_text(_PROGRAM.format(folder=folder, name=name))
        program.chmod(0o755)
    for name, ends in queues.items():
        (folder / f"queue.{name.replace('__', '.')}").write_text("".join(f"{end}\n" for end in ends))
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def calls(folder: pathlib.Path) -> list[str]:
    """Returns the command lines of all calls so far."""
    path = folder / "calls"
    return [line.strip() for line in path.read_text().splitlines()] if path.is_file() else []
