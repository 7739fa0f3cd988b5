"""Finds moments of videos by words or by a sound: `python -m mc3_jax.search --model M --clips C --text "..." --out S`.

M is anything that `mc3_jax.load` takes; C is a data set of clips, e.g. your own videos cut into windows by
`python -m data_prep.own_videos --videos FOLDER --every_s 0.75 --out C`. The sound and frames of every clip are embedded
once; S keeps the embeddings (`moments.npz`), so that the next query with the same clips and model takes seconds. Without a
query, moments are ranked by the similarity of their sound and frames, so that actions that sound come first.

Prints the best moments and writes `hits.csv` and `index.html`, a page to look at and listen to them.
"""

import argparse
import contextlib
import hashlib
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
import soundfile
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mc3_jax import embedder, mesh as mesh_lib, model as model_lib, terminal, training_facts
from mc3_jax.data import loader, records, tokenizer as tokenizer_lib
from mc3_jax.evals import moments as moments_lib

_MAX_SOUND_S = 60.0  # read of a query's sound file
_TOWERS = {"audio": ("audio",), "video": ("video",), "both": ("audio", "video")}  # compared with a query by each `--by`


def embed_queries(
    model: embedder.Embedder, texts: Sequence[str], sounds: Sequence[str]
) -> dict[str, np.ndarray | None]:
    """Returns query → its embedding [d], texts first; without any query, `moments.AGREEMENT` → None.

    Args:
      model: Model that embeds the queries.
      texts: Sentences, worded as those the model was trained on; for Ego4D "#C C chops the onion".
      sounds: Sound files that libsndfile can read; several channels are averaged. From a file longer than the model's window
        the loudest window is taken, and its times are printed.

    Raises:
      ValueError: Texts without a tokenizer, a file that can't be read, or a sound that the model doesn't take.
    """
    try:
        found = dict(zip(texts, model.embed_text(list(texts)), strict=True)) if texts else {}
    except ValueError as error:
        raise ValueError(f"--text: {error}; here: --tokenizer FOLDER") from error
    for path in sounds:
        try:
            waveform, rate = _read_sound(path)
            start, stop = _loudest(waveform, int(rate * model.window_samples / records.SAMPLE_RATE_HZ))
            if (start, stop) != (0, len(waveform)):
                print(f"--sound {terminal.printable(path)}: its loudest part, from {start / rate:.2f} to {stop / rate:.2f} s")
            found[path] = model.embed_audio(waveform[start:stop], rate)
        except (ValueError, OSError, soundfile.SoundFileError) as error:
            raise ValueError(f"--sound {path}: {error}") from error
    return found or {moments_lib.AGREEMENT: None}


def _check_questions(texts: Sequence[str], sounds: Sequence[str]) -> None:
    """Checks what needs no model, whose loading takes a while.

    Raises:
      ValueError: An empty text, or a file that is missing or no sound that libsndfile reads.
    """
    if empty := [text for text in texts if not text.strip()]:
        raise ValueError(f"--text {empty[0]!r} is empty: write what is to be found")
    for path in sounds:
        if not pathlib.Path(path).is_file():
            kind = "a folder" if pathlib.Path(path).is_dir() else "no file"
            raise ValueError(f"--sound {path} is {kind}: name a sound file")
        try:
            soundfile.info(path)
        except soundfile.SoundFileError as error:
            raise ValueError(
                f"--sound {path}: {error} Give WAV, FLAC, Ogg or MP3; of a video, `ffmpeg -i VIDEO -vn sound.wav` makes one"
            ) from error


def _choose_score(args: argparse.Namespace, untrained: Sequence[str]) -> str:
    """Returns the score to rank by: that of `--by`; without it both, or the one whose tower was trained, which is printed.

    Args:
      args: Options of the command line.
      untrained: Towers of the model that were never trained.

    Raises:
      ValueError: The score, a query, or the ranking without one needs a tower that was never trained.
    """
    free = [by for by in ("both", "audio", "video") if not set(_TOWERS[by]) & set(untrained)]
    by = args.by or (free[0] if free else "both")
    needs = {f"--by {by}": (_TOWERS[by], f"use --by {free[0]}" if free else "")}
    if args.text:
        needs["--text"] = (("text",), "" if "audio" in untrained else "ask by --sound")
    if args.sound:
        needs["--sound"] = (("audio",), "" if "text" in untrained else "ask by --text")
    if not args.text and not args.sound:
        needs = {"without --text or --sound": (_TOWERS["both"], "give one of these")}
    for what, (towers, fix) in needs.items():
        if bad := [tower for tower in towers if tower in untrained]:
            told = f"{what}: {training_facts.describe_untrained(bad)}"
            raise ValueError(f"{told}: {fix + ', or ' if fix else ''}name another --model")
    if by != "both" and not args.by:
        print(f"moments are ranked by their {'sound' if by == 'audio' else 'frames'} alone (--by {by})")
    return by


def _read_sound(path: str) -> tuple[np.ndarray, int]:
    """Returns (mean of the channels, sample rate in Hz) of a sound file, of at most its first minute."""
    with soundfile.SoundFile(path) as file:
        channels = file.read(int(_MAX_SOUND_S * file.samplerate), dtype="float32", always_2d=True)
        return channels.mean(axis=1), file.samplerate


def _loudest(waveform: np.ndarray, length: int) -> tuple[int, int]:
    """Returns (start, stop) of the loudest part with `length` samples; of the whole waveform if it is no longer."""
    if len(waveform) <= length:
        return 0, len(waveform)
    power = np.cumsum(np.concatenate([[0.0], waveform.astype(np.float64) ** 2]))
    start = int(np.argmax(power[length:] - power[:-length]))
    return start, start + length


def embed_moments(
    model: embedder.Embedder, source: loader.ClipSource, *, batch_size: int, num_threads: int
) -> moments_lib.Moments:
    """Returns the clips of a data set with the embeddings of their sounds and frames, computed on all local devices.

    Args:
      model: Model that embeds the clips.
      source: The clips.
      batch_size: Clips in a batch, rounded up to a multiple of the number of devices.
      num_threads: Number of threads that read and decode clips.

    Raises:
      ValueError: The clips don't fit the model.
    """
    mesh = mesh_lib.make_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    embed_all = model_lib.make_embed_fn(model_lib.make_model(model.config), model.config)

    @jax.jit
    def embed(params, batch):
        out = embed_all(params, batch)
        return {tower: out[tower] for tower in ("audio", "video")}  # so XLA removes the text tower

    batches = loader.eval_batches(
        source, tokenizer_lib.blank(model.config.text.num_tokens), batch_size=batch_size,
        num_samples=model.window_samples, num_threads=num_threads, prefetch=num_threads,
    )  # fmt: skip
    parts: dict[str, list[np.ndarray]] = {"audio": [], "video": []}
    progress = tqdm(total=len(source), unit="clip", desc="embedding", disable=not sys.stderr.isatty())
    with contextlib.closing(batches), progress, jax.set_mesh(mesh):
        for batch in batches:
            valid = batch["valid"]
            inputs = {name: batch[name] for name in ("audio", "video", "video_size", "text_ids", "text_mask")}
            out = embed(params, mesh_lib.put_batch(mesh, inputs))
            for tower, kept in parts.items():
                kept.append(np.asarray(out[tower], np.float32)[valid])
            progress.update(int(valid.sum()))
    rows = [(c.clip_id, c.video_uid, c.start_us, c.stop_us) for c in (source[i] for i in range(len(source)))]
    clip_id, video_uid, start_us, stop_us = zip(*rows, strict=True)
    return moments_lib.Moments(
        **{tower: np.concatenate(kept) for tower, kept in parts.items()}, clip_id=np.array(clip_id),
        video_uid=np.array(video_uid), start_us=np.array(start_us, np.int64), stop_us=np.array(stop_us, np.int64),
    )  # fmt: skip


def _made_of(model: embedder.Embedder, source: loader.ClipSource) -> str:
    """Returns the digest of everything that the embeddings depend on: clips, length of sounds, sizes and parameters."""
    digest = hashlib.sha256(f"{source.digest} {model.window_samples} {model.config}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def _open(folder: str, split: str, num_frames: int) -> loader.ClipSource:
    """Returns the clips of a split; "" takes all splits that have any."""
    if not split:
        splits = records.ClipsInfo.load(folder).splits
        split = "+".join(name for name, found in splits.items() if found.num_clips)
    return loader.open_split(folder, split, num_frames, option="--split")


def _check_window(model: embedder.Embedder, source: loader.ClipSource, folder: str) -> None:
    """Warns if any of the clips is longer or shorter than the model's audio window."""
    window_s = model.window_samples / records.SAMPLE_RATE_HZ
    least_s, most_s = (float(end(source.clip_samples)) / records.SAMPLE_RATE_HZ for end in (np.min, np.max))
    if max(window_s - least_s, most_s - window_s) > 0.05:
        last = f"{least_s:g} s" if least_s == most_s else f"{least_s:g} to {most_s:g} s"
        print(
            f"warning: the clips of {folder} last {last}, but the model's window is {window_s:g} s: longer clips are "
            "embedded with the middle of their sound but frames of the whole, shorter ones are padded with silence; cut them "
            "again with --window",
            file=sys.stderr,
        )


def search(args: argparse.Namespace) -> dict[str, list[moments_lib.Hit]]:
    """Runs every query of the command line: prints and writes its hits, and returns query → hits.

    Raises:
      ValueError: An option below 1, an `--out` that is a file, a model, clips or a query that can't be read or don't fit,
        or a tower that is needed but was never trained.
    """
    for name in ("top", "batch_size", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    _check_questions(args.text, args.sound)
    out = pathlib.Path(args.out)
    if out.is_file():
        raise ValueError(f"--out {out} is a file: name a folder")
    model = embedder.load(args.model, tokenizer=args.tokenizer)
    by = _choose_score(args, model.untrained)
    source = _open(args.clips, args.split, model.config.video.num_frames)
    _check_window(model, source, args.clips)
    queries = embed_queries(model, args.text, args.sound)
    out.mkdir(parents=True, exist_ok=True)
    made_of = _made_of(model, source)
    moments = moments_lib.load(out / moments_lib.FILE, made_of)
    if moments is None:
        moments = embed_moments(model, source, batch_size=args.batch_size, num_threads=args.num_threads)
        moments_lib.save(out / moments_lib.FILE, moments, made_of)
    found = {name: moments_lib.find(moments, query, by, args.top, model.untrained) for name, query in queries.items()}
    moments_lib.write_csv(out / "hits.csv", moments, found)
    page = moments_lib.write_page(
        out, moments, found, title="mc3_jax: moments found", by=by, source=source,
        facts=f"{len(moments)} clips of {len(np.unique(moments.video_uid))} videos in {args.clips}; model {args.model}",
    )  # fmt: skip
    for name, hits in found.items():
        print(terminal.printable(name))
        for hit in hits:
            at = moments_lib.clock(int(moments.start_us[hit.row]))
            print(f"  {hit.rank:>3}  {hit.score:.3f}  {at:>9}  {terminal.printable(str(moments.video_uid[hit.row]))}")
    print(f"{out / 'hits.csv'}\n{page}")
    return found


def _parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Finds moments by words or by a sound; without either, those whose sound and pictures agree."
    parser = argparse.ArgumentParser(prog="python -m mc3_jax.search", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="workdir of a run, folder of mc3_jax.convert, or a checkpoint of the paper's sizes")
    add("--clips", required=True, help="data set to search, e.g. of data_prep.own_videos --every_s 0.75")
    add("--out", required=True, help="folder for hits.csv, index.html and the embeddings")
    add("--text", action="append", default=[], help="what to find, worded like the training narrations; may be repeated")
    add("--sound", action="append", default=[], help="sound file; finds moments like its loudest part; may be repeated")
    add("--by", choices=moments_lib.SCORES, help="compare queries with a moment's sound, frames or both (default: both, or "
        "the one whose tower was trained)")  # fmt: skip
    add("--top", type=int, default=10, help="most moments per query (default %(default)s), of overlapping ones the best")
    add("--split", default="", help="split of the data set; default: all")
    add("--tokenizer", default="", help="folder of the tokenizer, if the model has none")
    add("--batch_size", type=int, default=64, help="clips embedded at a time (default %(default)s)")
    add("--num_threads", type=int, default=4, help="threads that read and decode clips (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Searches; for bad input, prints one line and exits with status 2, after Ctrl-C with 130."""
    args = _parse(argv)
    again = "interrupted: run the same command again; embeddings are kept once all are made"
    with terminal.errors_in_one_line(), terminal.interrupts(again):
        search(args)


if __name__ == "__main__":
    main()
