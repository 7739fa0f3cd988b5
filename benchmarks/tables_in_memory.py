"""Rows of Table 2 on an accelerator, each in minutes: `python -m benchmarks.tables_in_memory --rows=mc3,cmc --out=DIR`.

A SoundWorld of 20,000 training clips is rendered in memory (`benchmarks.rendered_world`) and put on the device as a whole,
which cuts batches from it. Every row is then trained by `mc3_jax.train_step` and evaluated on the test split. Only JSON is
written: one file per row and seed, from which `python -m benchmarks.tables --only_tables --out=DIR` makes tables. Rows whose
file exists are skipped.

The model is three times as wide as the demo's, its audio and video towers are twice as deep, and frames have 112 px. With
`--sweep FILE`, rows take the settings that `benchmarks.tables` has chosen (its `sweep.json`), else the suite's own.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rendered_world, runs, tables
from data_prep import vocabulary
from mc3_jax import (
    config as config_lib,
    mesh as mesh_lib,
    model as model_lib,
    phases as phases_lib,
    train_step as step_lib,
    validation,
    whole_file,
)
from mc3_jax.config import AudioConfig, Config, ModelConfig, TextConfig, VideoConfig
from mc3_jax.data import loader, tokenizer as tokenizer_lib, transforms
from mc3_jax.evals import discovery, retrieval

SHORT_SIDE_PX = 128
MODEL = ModelConfig(
    audio=AudioConfig(width=384, depth=6, num_heads=6, max_time_mask=40, max_mel_mask=32),
    video=VideoConfig(
        image_size_px=112, width=384, depth=6, num_heads=6, num_positions=4, resize_px=118, time_init="random",
        crop_scale=(0.4, 1.0),
    ),
    text=TextConfig(vocab_size=600, num_positions=16, num_tokens=16, width=384, depth=6, num_heads=6, mlp_width=1536),
    embed_dim=256,
)  # fmt: skip
EPOCHS, BATCH_SIZE = 24, 256  # epochs of all phases together, divided among them as in the suite


def row_config(row: tables.Row, setting: dict[str, float], *, model: ModelConfig, epochs: float, batch_size: int) -> Config:
    """Returns a row's config with a setting, at another size than the suite's.

    Args:
      row: Row of Table 2.
      setting: Axis → chosen value; see `tables.fields`.
      model: Sizes of the model.
      epochs: Epochs of all phases together.
      batch_size: Batch size; memories keep their size in batches.
    """
    config = tables.base_config("soundworld", row)
    share = epochs / max(sum(phase.epochs for phase in config.phases), 1e-9)
    for name, value in tables.fields(config, row, setting, share).items():
        *path, last = name.replace("[", ".").replace("]", "").split(".")
        holder = config
        for part in path:
            holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
        setattr(holder, last, value)
    for phase in config.phases:
        scale = phase.memory.pool_size // config.data.batch_size, phase.memory.dictionary_size // config.data.batch_size
        phase.memory = dataclasses.replace(
            phase.memory, pool_size=scale[0] * batch_size, dictionary_size=scale[1] * batch_size
        )
    config.model, config.data.batch_size = model, batch_size
    validation.validate(config)
    return config


class Store:
    """A split that lies on the device, and makes batches there.

    Attributes:
      clips: The split as it was rendered.
    """

    def __init__(self, clips: rendered_world.Clips, tokenize):
        """Puts a split on the default device, its narrations tokenized by `tokenize`."""
        tokens = [tokenize(text) for text in clips.texts]
        ids, mask = (np.stack([pair[i] for pair in tokens]) for i in (0, 1))
        self.clips = clips
        arrays = {"video": clips.video, "video_size": clips.video_size, "audio": clips.audio}
        self._arrays = jax.device_put(arrays | {"text_ids": ids, "text_mask": mask})
        self._take = jax.jit(self._cut)

    @staticmethod
    def _cut(arrays, index, frames):
        batch = {name: value[index] for name, value in arrays.items() if name != "video"}
        batch["video"] = arrays["video"][index[:, None], frames]
        return batch | {"row": jnp.arange(len(index), dtype=jnp.int32)}

    def batch(self, index: np.ndarray, rngs) -> dict[str, jax.Array]:
        """Returns the clips at `index` as a batch like the loader's.

        Args:
          index: Indices of the clips, [b].
          rngs: For each row, the random generator that chooses its frames, or None for the middle ones.
        """
        frames = [transforms.choose_frames(rendered_world.NUM_INTERVALS, rendered_world.NUM_CANDIDATES, rng) for rng in rngs]
        return self._take(self._arrays, np.asarray(index, np.int32), np.asarray(frames, np.int32))


def train(config: Config, store: Store):
    """Returns (parameters after all phases of a run, metrics of the last step).

    Raises:
      ValueError: The loss or gradient of a step was not finite.
    """
    clips, batch_size = store.clips, config.data.batch_size
    phases = phases_lib.plan_phases(config.phases, len(clips), batch_size)
    model, mesh = model_lib.make_model(config.model), mesh_lib.make_mesh(devices=jax.devices()[:1])

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return loader.epoch_order(clips.video_clips, config.data.clips_per_video, config.seed, epoch)

    def plan(phase: phases_lib.Phase):
        init = functools.partial(step_lib.init_state, model, config, phase)
        return init, mesh_lib.abstract_state(mesh, jax.eval_shape(init))

    with jax.set_mesh(mesh):
        init, abstract = plan(phases[0])
        state = step_lib.draw_state(init, abstract)
        metrics = {}
        for phase in phases:
            if phase.start:
                state = step_lib.enter_phase(config, phase, state, plan(phase)[1])
            step_fn = step_lib.jit_train_step(model, config, phase, state)
            for step in range(phase.start, phase.stop):
                epochs, places = np.divmod(step * batch_size + np.arange(batch_size), len(clips))
                index = [order(int(e))[p] for e, p in zip(epochs, places, strict=True)]
                rngs = [np.random.default_rng([config.seed, int(e), 1 + int(p)]) for e, p in zip(epochs, places, strict=True)]
                state, metrics, health = step_fn(state, store.batch(index, rngs), np.int32(step))
            if not bool(health.taken):
                name = phase.config.name
                raise ValueError(f"{config.name}: a step of phase {name!r} is not finite: lower its learning rate")
        return state.params, {name: float(value) for name, value in metrics.items()}


def embed(config: Config, params, store: Store) -> dict[str, np.ndarray]:
    """Returns modality → float32 embeddings of all clips of a store, [n, d]."""
    fn = jax.jit(model_lib.make_embed_fn(model_lib.make_model(config.model), config.model))
    parts, size, num = [], config.data.batch_size, len(store.clips)
    for start in range(0, num, size):
        index = np.minimum(np.arange(start, start + size), num - 1)
        parts.append(jax.device_get(fn(params, store.batch(index, [None] * size))))
    return {name: np.concatenate([part[name] for part in parts])[:num].astype(np.float32) for name in parts[0]}


def measure(embeddings: dict[str, np.ndarray], clips: rendered_world.Clips) -> dict:
    """Returns {"discovery", "retrieval", "clips"}, the last with what comparisons of rows need of each clip."""
    scores = discovery.similarities(embeddings)
    draws = {"num_bootstrap": 1000, "seed": 0}
    groups = np.unique(np.stack([clips.verb_id, clips.noun_id], 1), axis=0, return_inverse=True)[1].reshape(-1)
    sounding = clips.label == 1
    videos = np.repeat(np.arange(len(clips.video_clips)), clips.video_clips)
    return {
        "discovery": {
            pair: discovery.discover(score, clips.label, clips.verb_id, videos, **draws) for pair, score in scores.items()
        },
        "retrieval": retrieval.retrieve({k: v[sounding] for k, v in embeddings.items()}, groups[sounding], 0),
        "clips": {
            "label": clips.label.tolist(), "verb_id": clips.verb_id.tolist(), "region": clips.region,
            "video_uid": videos.tolist(),
            **{pair: np.round(score.astype(np.float64), 6).tolist() for pair, score in scores.items()},
        },
    }  # fmt: skip


def make_tokenize(texts: list[str], text: config_lib.TextConfig):
    """Returns `tokenize(text) -> (ids, mask)` with a vocabulary that is trained on `texts`."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.train_vocabulary(texts, text.vocab_size).save_pretrained(folder)
        return tokenizer_lib.load_tokenizer(folder, text.num_tokens, text.vocab_size)


def _is_done(path: pathlib.Path, asked: dict, setting: dict[str, float]) -> bool:
    """Returns whether a row's file exists; raises ValueError if it was run with other options or another setting."""
    if not path.exists():
        return False
    results, asked = json.loads(path.read_text()), asked | {"setting": setting}
    there = results["asked"] | {"setting": results["setting"]}
    odd = [name for name, value in asked.items() if there[name] != json.loads(json.dumps(value))]
    if odd:
        raise ValueError(
            f"{path} was run with {odd[0]} = {there[odd[0]]}, not {asked[odd[0]]}: remove it, or name another --out"
        )
    return True


def run(args: argparse.Namespace, model: ModelConfig, epochs: float, batch_size: int) -> list[pathlib.Path]:
    """Renders the world and runs the rows whose files don't exist yet; returns the files of all rows.

    Raises:
      ValueError: A file exists from a run with other options or another setting, or a step is not finite.
    """
    begin = time.monotonic()
    wanted = [row for row in tables.ROWS if row.file in args.rows.split(",")]
    paths = {row: args.out / "runs" / row.file / f"seed-{args.seed}" / "results.json" for row in wanted}
    asked = {
        "videos": args.videos, "world_seed": args.world_seed, "short_side": args.short_side, "epochs": epochs,
        "batch_size": batch_size, "model": dataclasses.asdict(model),
    }  # fmt: skip
    chosen = json.loads(args.sweep.read_text()) if args.sweep else {}
    settings = {row: chosen.get(row.file, {"chosen": {}})["chosen"] for row in wanted}
    missing = [row for row in wanted if not _is_done(paths[row], asked, settings[row])]
    if not missing:
        return list(paths.values())
    world = rendered_world.render(
        args.videos, seed=args.world_seed, short_side_px=args.short_side, num_workers=args.num_workers
    )
    tokenize = make_tokenize(world["train"].texts, model.text)
    stores = {name: Store(world[name], tokenize) for name in ("train", "test")}
    rendered_s = time.monotonic() - begin
    print(f"{len(world['train'])} training and {len(world['test'])} test clips in {rendered_s:.0f} s", flush=True)
    for row in missing:
        begin = time.monotonic()
        config = row_config(row, settings[row], model=model, epochs=epochs, batch_size=batch_size)
        config.seed = args.seed
        if config.phases:
            params, last = train(config, stores["train"])
        else:
            params = model_lib.init_params(model_lib.make_model(config.model), config.model, config.seed)
            last = {}
        trained_s = time.monotonic() - begin
        results = measure(embed(config, params, stores["test"]), world["test"])
        seen = sum(phase.epochs for phase in config.phases) * len(world["train"])
        facts = {
            "config": row.file, "seed": args.seed, "split": "test", "setting": settings[row],
            "data": f"soundworld, {args.videos} videos of seed {args.world_seed}", "device": jax.devices()[0].device_kind,
            "jax": jax.__version__, "rendered_s": rendered_s, "trained_s": trained_s, "clips_seen": seen, "last_step": last,
            "seconds": time.monotonic() - begin, "asked": asked,
        }  # fmt: skip
        paths[row].parent.mkdir(parents=True, exist_ok=True)
        with whole_file.writing(paths[row]) as aside:
            aside.write_text(json.dumps(facts | results) + "\n")
        found = "  ".join(f"{pair.upper()} {results['discovery'][pair]['roc_auc']:.4f}" for pair in row.pairs)
        print(f"{row.title}, seed {args.seed}: {found}  ({trained_s:.0f} s of training)", flush=True)
    return list(paths.values())


def main(argv: list[str] | None = None) -> None:
    """Runs the rows with the model, epochs and batch size that are meant for an accelerator."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables_in_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(row.file for row in tables.ROWS), help="files of configs/tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/tables/in_memory"))
    parser.add_argument("--videos", type=int, default=1200, help="videos to render, of 17 training clips each")
    parser.add_argument("--world_seed", type=int, default=21)
    parser.add_argument("--short_side", type=int, default=SHORT_SIDE_PX, help="height of the pictures, px")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that render")
    parser.add_argument("--sweep", type=pathlib.Path, help="sweep.json of benchmarks.tables")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.rows.split(",")) - {row.file for row in tables.ROWS})
    if unknown:
        parser.error(f"--rows: {unknown[0]!r} is none of {', '.join(row.file for row in tables.ROWS)}")
    with runs.ending_in_one_line():
        run(args, MODEL, args.epochs, args.batch_size)


if __name__ == "__main__":
    main()
