"""Makes a small SoundWorld and converts it by the commands a user would type; shrinks the demo's config to its size."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

from configs import demo
from mc3_jax.config import Config
from mc3_jax.data import records

ROOT = pathlib.Path(__file__).parents[1]
EVALUATION_PAGE = ROOT / "docs" / "evaluation.md"


def run(module: str, *args: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    """Runs `python -m module args`, by default in the project's folder, and returns the finished process."""
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def make_videos(folder: pathlib.Path, num_videos: int, seconds: int) -> pathlib.Path:
    """Makes narrated videos in `folder` and returns `folder`; `seconds` is their mean length."""
    done = run("data_prep.soundworld", "--out", folder, "--videos", num_videos, "--video_seconds", seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def make(folder: pathlib.Path) -> pathlib.Path:
    """Makes videos, clips and vocabulary under `folder` and returns `folder`."""
    steps = (
        ("data_prep.soundworld", "--out", folder / "world", "--videos", "8", "--video_seconds", "30"),
        ("data_prep.ego4d", "--root", folder / "world", "--out", folder / "clips", "--short_side", "72"),
        ("data_prep.vocabulary", "--clips", folder / "clips", "--out", folder / "vocabulary"),
    )
    for step in steps:
        done = run(*step)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def undocumented(names: Iterable[str]) -> list[str]:
    """Returns those of `names`, which evaluation writes, that `docs/evaluation.md` does not have between backquotes."""
    text = EVALUATION_PAGE.read_text()
    return sorted(name for name in set(names) if f"`{name}`" not in text)


def keys_of(value) -> Iterator[str]:
    """Yields every key of nested JSON, except the keys of "earlier", which are names of checkpoints."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(list(inner.values()) if key == "earlier" else inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def small_config(folder: pathlib.Path) -> Config:
    """Returns the demo's config with towers of one narrow layer, batches of 16 and one epoch a phase (about ten steps)."""
    config = demo.get_config()
    config.data.dir, config.data.tokenizer = str(folder / "clips"), str(folder / "vocabulary")
    config.data.batch_size = config.eval.batch_size = 16
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.width, tower.depth, tower.num_heads = 16, 1, 2
    config.model.text.mlp_width, config.model.embed_dim = 32, 8
    for phase in config.phases:
        phase.epochs = 1
    config.save.every_steps, config.save.keep = 3, 100
    config.log.every_steps, config.log.clips = 1, True
    config.eval.num_bootstrap, config.eval.num_examples = 50, 1
    return config


def change_clips(config: Config, folder: pathlib.Path, **changes: dict) -> None:
    """Points `config` at a copy of its data in `folder` whose `clips.json` has `changes`: split → its changed fields."""
    folder = folder / "clips"
    shutil.copytree(config.data.dir, folder, dirs_exist_ok=True)
    info = json.loads((folder / "clips.json").read_text())
    for split, fields in changes.items():
        info["splits"][split] |= fields
    info.pop("sha256")
    (folder / "clips.json").write_text(records.manifest(info))
    config.data.dir = str(folder)
