"""Speed of the input pipeline, from ArrayRecord to batches on a device: `python -m benchmarks.input_pipeline`.

The clips have the paper's size: four JPEG files of 256 x 344 px and about 30 KB, and 1.5 s of sound. Their pictures are noise
with the spectrum of photographs. Three readers take turns, each on all cores:
  * decode-only: simplejpeg alone, with a thread per core; it reads no records and makes no batches;
  * `mc3_jax.data.loader.train_batches`, onto the device, once with a thread per core and once with a worker per core;
  * torch's DataLoader with a worker per core and the same decoder, from one memory-mapped file, onto the device as well.
A batch is copied to a GPU while the next one is waited for, as in training; on a CPU nothing is copied.
Ends with status 1 if threads and workers both miss a goal: 90 % of decode-only, 400 clips/s per core, no slower than the
DataLoader. The second is not judged on a host where decode-only does not reach it either. `--candidates 4` makes records of
the size that `data_prep` makes by default: whole records are read, while DataLoader reads the chosen frames alone. `--parts`
times the parts of the work on a clip instead, in this process alone.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Generator, Iterator

import jax
import numpy as np
import simplejpeg
from array_record.python import array_record_module

from benchmarks import record
from mc3_jax.data import loader, memory, records, tokenizer, transforms

HEIGHT_PX, WIDTH_PX, NUM_FRAMES, NUM_SAMPLES = 256, 344, 4, 24_000
JPEG_BYTES = 30_000
WANTED_SHARE, WANTED_CLIPS_PER_S = 0.9, 400.0
DECODING, PEER = "decode-only (simplejpeg)", "torch DataLoader, processes"


def make_picture(rng: np.random.Generator) -> np.ndarray:
    """Returns noise whose amplitude falls as one over frequency, as in photographs, uint8 [h, w, 3]."""
    down, across = np.fft.fftfreq(HEIGHT_PX)[:, None], np.fft.rfftfreq(WIDTH_PX)
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / WIDTH_PX)
    shape = (*amplitude.shape, 3)
    spectrum = amplitude[..., None] * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))
    noise = np.fft.irfft2(spectrum, s=(HEIGHT_PX, WIDTH_PX), axes=(0, 1))
    common = noise[..., :1] * 0.8 + noise * 0.2  # colours follow brightness
    return np.clip(128 + 50 * common / common.std(), 0, 255).astype(np.uint8)


def choose_quality(pictures: list[np.ndarray]) -> int:
    """Returns the JPEG quality at which the mean file size is nearest to `JPEG_BYTES`."""

    def distance(quality: int) -> float:
        sizes = [len(simplejpeg.encode_jpeg(picture, quality, colorsubsampling="420")) for picture in pictures]
        return abs(float(np.mean(sizes)) - JPEG_BYTES)

    return min(range(30, 99, 2), key=distance)


def make_clips(folder: pathlib.Path, num_clips: int, candidates: int = 1) -> list[records.Clip]:
    """Writes a data set with a training split into `folder` and returns its clips, with `candidates` frames an interval."""
    rng = np.random.default_rng(0)
    pictures = [make_picture(rng) for _ in range(64)]
    quality = choose_quality(pictures[:8])
    files = [simplejpeg.encode_jpeg(picture, quality, colorsubsampling="420") for picture in pictures]
    clips, num_frames = [], NUM_FRAMES * candidates
    for i in range(num_clips):
        clips.append(
            records.Clip(
                clip_id=f"clip_{i}", video_uid=f"video_{i // 16}", narration="#C C opens the drawer", source="benchmark",
                time_us=500_000, start_us=0, stop_us=1_500_000, frames=[files[j] for j in rng.integers(0, 64, num_frames)],
                frame_times_us=np.arange(num_frames) * 1_500_000 // num_frames, frame_height=HEIGHT_PX, frame_width=WIDTH_PX,
                audio=rng.integers(-3000, 3000, NUM_SAMPLES, np.int16),
            )
        )  # fmt: skip
    name = "bench-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")  # as data_prep does
    for clip in clips:
        writer.write(records.encode(clip))
    writer.close()
    per_video = [len(clips[i : i + 16]) for i in range(0, num_clips, 16)]
    shard = records.Shard(name, num_clips, (folder / name).stat().st_size, "", per_video)
    records.ClipsInfo(
        name="bench", window_s=(0.5, 1.0), num_intervals=NUM_FRAMES, num_candidates=candidates, short_side_px=HEIGHT_PX,
        canvas_px=(HEIGHT_PX, WIDTH_PX), num_samples=NUM_SAMPLES, verbs=[], nouns=[],
        splits={"train": records.SplitInfo(num_clips, 0, 0, [shard])},
    ).dump(folder)  # fmt: skip
    return clips


def decode_only(clips: list[records.Clip], num_threads: int) -> Generator[int, None, None]:
    """Decodes the clips in an endless loop; yields 1 after each clip."""

    def decode(clip: records.Clip) -> None:
        for file in clip.frames:
            simplejpeg.decode_jpeg(file)

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        # So many clips are always queued that no thread has to wait.
        waiting = collections.deque(pool.submit(decode, clip) for clip in clips[: 8 * num_threads])
        for clip in itertools.cycle(clips):
            waiting.popleft().result()
            waiting.append(pool.submit(decode, clip))
            yield 1


def ours(folder: pathlib.Path, batch_size: int, **readers: int) -> Generator[int, None, None]:
    """Reads batches onto the device in an endless loop; yields the number of clips of each."""
    source = loader.open_split(folder, "train", NUM_FRAMES)
    batches = loader.train_batches(
        source, tokenizer.blank(30), batch_size=batch_size, seed=0, prefetch=max(4, *readers.values()), **readers
    )
    with contextlib.closing(batches):
        before = None
        for batch in batches:
            placed = jax.device_put(batch)
            jax.block_until_ready(before)
            before = placed
            yield batch_size


def peer(folder: pathlib.Path, clips: list[records.Clip], batch_size: int, num_workers: int) -> Generator[int, None, None]:
    """Reads batches of the same JPEG files by a torch DataLoader in an endless loop; yields the number of clips of each."""
    import torch.utils.data

    path, places, at = folder / "peer.bin", [], 0
    with path.open("wb") as file:
        for clip in clips:
            parts = [*clip.frames, clip.audio.tobytes()]
            places.append([(at + sum(map(len, parts[:i])), len(part)) for i, part in enumerate(parts)])
            at += sum(file.write(part) for part in parts)

    class Clips(torch.utils.data.Dataset):
        def __init__(self):
            self.bytes = np.memmap(path, np.uint8, "r")

        def __len__(self):
            return len(places)

        def __getitem__(self, i):
            *frames, sound = [self.bytes[start : start + size].tobytes() for start, size in places[i]]
            video = np.stack([simplejpeg.decode_jpeg(frame) for frame in frames])
            ids = np.zeros(30, np.int32)
            return {"video": video, "audio": np.frombuffer(sound, np.int16).copy(), "text_ids": ids, "text_mask": ids}

    # An endless sampler, so that no worker is started again.
    order = torch.utils.data.RandomSampler(Clips(), replacement=True, num_samples=10**9)
    has_gpu = torch.cuda.is_available()
    for batch in torch.utils.data.DataLoader(
        Clips(), batch_size, sampler=order, num_workers=num_workers, drop_last=True, prefetch_factor=4, pin_memory=has_gpu
    ):
        if has_gpu:
            batch = {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}
        yield len(batch["audio"])


def time_parts(folder: pathlib.Path, batch_size: int, rounds: int) -> list[list[str]]:
    """Times the parts of making a batch; returns a table row for each: name, median ms per clip, least and most.

    A part that runs alone finds its code and data in the processor's cache. In the last two rows the parts alternate, so
    that they evict each other's. This process keeps the memory that it frees from here on, as the loader's workers do.
    """
    memory.keep_freed()
    source, tokenize = loader.open_split(folder, "train", NUM_FRAMES), tokenizer.blank(30)
    canvas = np.empty((batch_size, *source.video_shape), np.uint8)
    rng = np.random.default_rng(0)

    def sample(index: int, clip: records.Clip) -> transforms.Sample:
        return transforms.make_sample(clip, source.info, tokenize, np.random.default_rng([0, index]), pictures=True)

    def decode(row: int, of: transforms.Sample) -> None:
        transforms.decode_frames(of.jpegs, canvas[row], of.clip_id)

    def work(indices: list[int], clips: list[records.Clip], samples: list[transforms.Sample]):
        yield "decoding, each clip over the one before", lambda: [decode(0, each) for each in samples]
        yield "decoding into a batch", lambda: [decode(row, each) for row, each in enumerate(samples)]
        yield "reading and parsing the record", lambda: [source[i] for i in indices]
        yield "choosing frames and sound", lambda: [sample(i, clip) for i, clip in zip(indices, clips, strict=True)]
        yield (
            "all of a clip, then the next",
            lambda: [decode(row, sample(i, source[i])) for row, i in enumerate(indices)],
        )
        yield (
            f"all, {batch_size} records read before they are decoded",
            lambda: [decode(row, each) for row, each in enumerate([sample(i, source[i]) for i in indices])],
        )

    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        indices = rng.choice(len(source), batch_size, replace=False).tolist()
        clips = [source[i] for i in indices]
        for name, part in work(indices, clips, [sample(i, clip) for i, clip in zip(indices, clips, strict=True)]):
            begin = time.perf_counter()
            part()
            times[name].append(1000 * (time.perf_counter() - begin) / batch_size)
    return [
        [name, f"{np.median(values):.3f}", f"{min(values):.3f} to {max(values):.3f}"] for name, values in times.items()
    ]


def clips_per_second(stream: Iterator[int], seconds: float) -> float:
    """Returns clips per second of a stream, which yields numbers of clips, over at least `seconds`."""
    begin, num = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        num += next(stream)
    return num / (time.perf_counter() - begin)


def judge(decoding: float, own: float, peer: float | None) -> tuple[list[str], str]:
    """Returns (the goals that are missed, in words; why the goal of clips/s is not judged, or "").

    Args:
      decoding: Clips/s per core of decoding alone.
      own: Those of threads or workers, whichever are faster.
      peer: Those of torch's DataLoader; None if it was not measured.
    """
    goals = {f"{own / decoding:.2f} of decode-only, wanted {WANTED_SHARE}": own >= WANTED_SHARE * decoding}
    wanted, unjudged = f"{WANTED_CLIPS_PER_S:.0f} clips/s per core", ""
    if decoding >= WANTED_CLIPS_PER_S:
        goals[f"{own:.0f} clips/s per core, wanted {WANTED_CLIPS_PER_S:.0f}"] = own >= WANTED_CLIPS_PER_S
    else:
        unjudged = f"decoding alone gives {decoding:.0f} per core on this host, so that no pipeline could reach {wanted}"
    if peer is not None:
        goals[f"{own / peer:.2f} times torch's DataLoader, wanted 1"] = own >= peer
    return [goal for goal, met in goals.items() if not met], unjudged


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input_pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=1, help="frames stored per interval, of which one is decoded")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds for each reader in a round")
    parser.add_argument("--parts", action="store_true", help="time the parts of a clip instead, over --rounds batches")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    if not 0 < args.batch_size <= args.clips or min(args.rounds, args.candidates) < 1:
        parser.error("--rounds and --candidates must be at least 1, and --batch_size from 1 to --clips")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        clips = make_clips(folder, args.clips, args.candidates)
        size = np.mean([len(frame) for clip in clips for frame in clip.frames])
        inputs = f"Four JPEG files of {HEIGHT_PX} x {WIDTH_PX} px and {size / 1000:.1f} KB a clip"
        inputs += f" out of {NUM_FRAMES * args.candidates} that the record holds" * (args.candidates > 1)
        inputs += f", batches of {args.batch_size}"
        if args.parts:
            rows = time_parts(folder, args.batch_size, args.rounds)
            table = record.markdown(["", "ms a clip", "least and most"], rows)
            text = f"{inputs}; one process, medians of {args.rounds} batches, in turn.\n\n{table}"
            record.append("What a clip takes", text, "grain", "simplejpeg", path=args.results)
            return
        shown = [dataclasses.replace(clip, frames=clip.frames[:: args.candidates]) for clip in clips]
        streams = {
            DECODING: decode_only(shown, cores),
            "mc3_jax, threads": ours(folder, args.batch_size, num_threads=cores),
            "mc3_jax, workers": ours(folder, args.batch_size, num_workers=cores),
        }
        try:
            streams[PEER] = peer(folder, shown, args.batch_size, cores)
            next(streams[PEER])
        except ImportError:
            print("torch is not installed: its DataLoader is left out", file=sys.stderr)
            del streams[PEER]
        rates: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(args.rounds):
            for label, stream in streams.items():
                clips_per_second(stream, 2.0)  # uses up batches read ahead earlier, while other readers fill their buffers
                rates[label].append(clips_per_second(stream, args.seconds) / cores)
        for stream in streams.values():
            stream.close()
    medians = {label: float(np.median(values)) for label, values in rates.items()}
    decoding, own = medians[DECODING], max(rate for label, rate in medians.items() if label not in (DECODING, PEER))
    rows = [
        [label, f"{medians[label]:.0f}", f"{min(values):.0f} to {max(values):.0f}", f"{medians[label] / decoding:.2f}"]
        for label, values in rates.items()
    ]
    missed, unjudged = judge(decoding, own, medians.get(PEER))
    text = (
        f"{inputs}; medians of {args.rounds} rounds.\n\n"
        + record.markdown(["", "clips/s per core", "least and most", "of decode-only"], rows)
        + (f"\n\nNot judged: {unjudged}." if unjudged else "")
        + (f"\n\nMissed: {'; '.join(missed)}." if missed else "")
    )
    record.append("Input pipeline", text, "grain", "simplejpeg", "torch", path=args.results)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
