"""Clips per second and core, ours against one ffmpeg process for each clip: `python -m benchmarks.clip_extraction`.

Makes a 10-minute 540p file (H.264, keyframe every 250 frames, AAC) and cuts clips [t - 0.5 s, t + 1.0 s] of 16 frames and
16 kHz audio out of it, for moments t at several distances. The clips are cut in turn

- by `data_prep.guard`, as in the converters: a child process cuts, and this process receives the clips;
- by `ffmpeg -ss A -i FILE`, one process for each clip, which seeks and decodes from the keyframe on ("input seek");
- by `ffmpeg -i FILE -ss A`, which decodes from the file's beginning, as published extraction scripts do ("output seek").

All write the same number of JPEG files of the same size and a wav file. ffmpeg's `-q:v 3` has the luma quantization steps
nearest to those of libjpeg's quality 90 (both are printed). CPU time is compared, with one thread each; the clips that ffmpeg
cuts are spread evenly over the file. `--hours 2` instead measures our child's memory while it reads a file of that length.
Goals that are missed are printed, and the exit status is then 1.
`pip install '.[prep,bench]'` brings ffmpeg.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
import wave
from fractions import Fraction

import av
import cv2
import imageio_ffmpeg
import numpy as np
import simplejpeg

from benchmarks import record
from data_prep import guard
from data_prep.windows import Window, frame_times

FPS, WIDTH, HEIGHT, GOP = 30, 960, 540, 250
BASE_S = 50.0  # length of the rendered video, which longer files repeat
SHORT_SIDE_PX, QUALITY, FFMPEG_QUALITY = 256, 90, 3
BEFORE_S, AFTER_S, NUM_FRAMES = 0.5, 1.0, 16
# Goals: (seconds between clips, peer) → least ratio of our clips per CPU second to the peer's; most memory of a child.
WANTED = {(2.7, "output seek"): 80.0, (2.7, "input seek"): 2.0, (30.0, "input seek"): 1.4}
MEMORY_MB = 600
# Columns of the table: title → format of a row's field.
COLUMNS = {
    "clips": "{clips}", "clips per CPU second": "{clips_per_cpu_s:.3g}", "clips per wall second": "{clips_per_wall_s:.3g}",
    "ours relative to it, by CPU time": "{ours_over_it:.3g}", "bytes of a JPEG": "{jpeg_bytes:,.0f}",
    "luma step": "{luma_step:.1f}",
}  # fmt: skip
MEMORY_COLUMNS = {
    "clips": "{clips:,}", "at, s": "{at_s:.0f}", "MiB resident": "{resident_mb:.0f}", "at its peak": "{peak_mb:.0f}",
}  # fmt: skip


def make_base(path: pathlib.Path, seed: int) -> None:
    """Writes a video of `BASE_S`: a camera wanders over a textured plane, two ellipses in front of it; the sound is noise."""
    rng = np.random.default_rng(seed)
    plane = _texture(rng, 1400, 2600)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.options = {"preset": "medium", "crf": "23", "g": str(GOP), "keyint_min": str(GOP), "sc_threshold": "0"}
        audio = container.add_stream("aac", rate=48_000, layout="stereo")
        samples = rng.normal(0, 0.1, (2, round(BASE_S * 48_000))).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(audio.encode(sound) + audio.encode(None))
        for number in range(round(BASE_S * FPS)):
            frame = av.VideoFrame.from_ndarray(_view(plane, number / FPS, rng), format="bgr24").reformat(
                format="yuv420p"
            )
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    plane = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        noise = rng.normal(size=(max(height >> (9 - octave), 2), max(width >> (9 - octave), 2), 3)).astype(np.float32)
        plane += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * 2.0 ** (-0.8 * octave)
    plane = (255 * (plane - plane.min()) / np.ptp(plane)).astype(np.uint8)
    for _ in range(250):
        corners = (60 * rng.uniform(size=(5, 2)) + rng.uniform(size=2) * (width, height)).astype(np.int32)
        cv2.fillConvexPoly(plane, cv2.convexHull(corners), rng.integers(0, 255, 3).tolist(), cv2.LINE_AA)
    return plane


def _view(plane: np.ndarray, t: float, rng: np.random.Generator) -> np.ndarray:
    x = 1300 + 500 * np.sin(0.21 * t) + 60 * np.sin(0.9 * t) + 4 * np.sin(9 * t)
    y = 700 + 200 * np.sin(0.17 * t) + 40 * np.sin(1.1 * t) + 3 * np.sin(11 * t)
    turn = cv2.getRotationMatrix2D((x, y), 4 * np.sin(0.5 * t) + 0.5 * np.sin(2.9 * t), 1 + 0.1 * np.sin(0.3 * t))
    turn[:, 2] += (WIDTH / 2 - x, HEIGHT / 2 - y)
    view = cv2.warpAffine(plane, turn, (WIDTH, HEIGHT))
    for k in range(2):
        center = (int(300 + 360 * k + 80 * np.sin(2 * t + k)), int(430 + 60 * np.cos(1.7 * t + k)))
        cv2.ellipse(view, center, (110, 60), 20 * np.sin(t + k), 0, 360, (90, 120, 190), -1, cv2.LINE_AA)
    return np.clip(view.astype(np.int16) + rng.integers(-3, 4, (HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8)


def lengthen(base: pathlib.Path, path: pathlib.Path, seconds: float) -> None:
    """Writes a file of about `seconds`, by repeating the packets of `base` as they are."""
    with av.open(str(base)) as source, av.open(str(path), "w") as out:
        made = {s.index: out.add_stream_from_template(s) for s in source.streams}
        packets = [p for p in source.demux() if p.size]
        # Each stream repeats after its own length, since AAC's packets do not add up to the video's length.
        steps = {i: sum(p.duration for p in packets if p.stream_index == i) for i in made}
        copies = {p: bytes(p) for p in packets}
        for turn in range(round(seconds / BASE_S)):
            for p in packets:
                copy = av.Packet(copies[p])
                copy.pts, copy.dts, copy.duration = (
                    p.pts + turn * steps[p.stream_index],
                    p.dts + turn * steps[p.stream_index],
                    p.duration,
                )
                copy.time_base, copy.is_keyframe, copy.stream = p.time_base, p.is_keyframe, made[p.stream_index]
                out.mux(copy)


def windows_at(times_s) -> list[Window]:
    return [
        Window(t - BEFORE_S, t + AFTER_S, frame_times(t - BEFORE_S, t + AFTER_S, 4, NUM_FRAMES // 4))
        for t in map(float, times_s)
    ]


def cut_ours(path: pathlib.Path, windows: list[Window], folder: pathlib.Path) -> tuple[float, float]:
    """Writes the clips' files through `data_prep.guard`; returns (CPU seconds of child and this process, wall seconds)."""
    child = guard.ready()  # started before the clock, as in a worker of the converters
    cpu_s, wall_s = _cpu_s(child.pid) + time.process_time(), time.monotonic()
    for i, cut in guard.cut_windows(path, windows, short_side_px=SHORT_SIDE_PX, quality=QUALITY, limits=guard.Limits()):
        if isinstance(cut, str):
            raise SystemExit(f"clip {i}: {cut}")
        for k, jpeg in enumerate(cut.frames):
            (folder / f"{i}_{k:02}.jpg").write_bytes(jpeg)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(cut.audio.tobytes())
    return _cpu_s(child.pid) + time.process_time() - cpu_s, time.monotonic() - wall_s


def _cpu_s(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cut_theirs(
    path: pathlib.Path, window: Window, i: int, folder: pathlib.Path, peer: str
) -> tuple[float, float]:
    """Writes one clip's files by ffmpeg, with the seek that `peer` names; returns (CPU seconds, wall seconds)."""
    seek, name = ["-ss", f"{window.start_s:.6f}"], ["-i", str(path)]
    width = 2 * round(SHORT_SIDE_PX * WIDTH / HEIGHT / 2)
    length = ["-t", f"{window.stop_s - window.start_s:.6f}"]
    # The frame that is shown at each time, as in ours: `round=up` takes the last frame that begins before it.
    filters = (
        f"fps={Fraction(NUM_FRAMES) / Fraction(window.stop_s - window.start_s)}:round=up,scale={width}:{SHORT_SIDE_PX}"
    )
    files = str(folder / f"{i}_%02d.jpg"), str(folder / f"{i}.wav")
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-threads", "1", "-filter_threads", "1",
        *(seek + name if peer == "input seek" else name + seek),
        *length, "-map", "0:v:0", "-vf", filters, "-threads", "1", "-q:v", str(FFMPEG_QUALITY), files[0],
        *([] if peer == "input seek" else seek), *length, "-map", "0:a:0", "-ac", "1", "-ar", "16000", files[1],
    ]  # fmt: skip
    before, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, time.monotonic() - wall_s


def check(folder: pathlib.Path, clips: list[int]) -> tuple[float, float]:
    """Checks number and size of the clips' files; returns the means of (bytes, luma quantization step) over JPEG files."""
    sizes, steps = [], []
    for i in clips:
        jpegs = [path.read_bytes() for path in sorted(folder.glob(f"{i}_*.jpg"))]
        assert len(jpegs) == NUM_FRAMES, f"{folder} clip {i}: {len(jpegs)} frames"
        for jpeg in jpegs:
            height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
            assert (height, width) == (SHORT_SIDE_PX, 2 * round(SHORT_SIDE_PX * WIDTH / HEIGHT / 2)), (height, width)
            table = jpeg.index(b"\xff\xdb") + 5
            sizes.append(len(jpeg))
            steps.append(np.mean(list(jpeg[table : table + 64])))
        with contextlib.closing(wave.open(str(folder / f"{i}.wav"), "rb")) as file:
            assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
            assert abs(file.getnframes() - 24_000) <= 341, file.getnframes()  # ffmpeg cuts at packets
    return float(np.mean(sizes)), float(np.mean(steps))


def measure(path: pathlib.Path, gap_s: float, rounds: int, peers: dict[str, int], seconds: float) -> dict:
    """Returns "ours" or peer → {"clips", "clips_per_cpu_s", "clips_per_wall_s", "jpeg_bytes", "luma_step"}.

    Ours and the peers take turns on each part of the file.

    Args:
      path: Path of the video.
      gap_s: Seconds between the clips' moments.
      rounds: Number of parts into which the file is divided.
      peers: Name of a peer → number of clips that it cuts in each part.
      seconds: Length of the file in seconds.
    """
    found = {name: [] for name in ("ours", *peers)}
    looks = {name: [] for name in found}
    times = np.arange(1.0, seconds - AFTER_S - 0.1, gap_s)
    for part in np.array_split(times, rounds):
        windows = windows_at(part)
        with tempfile.TemporaryDirectory() as folder:
            found["ours"].append((len(windows), *cut_ours(path, windows, pathlib.Path(folder))))
            looks["ours"].append(check(pathlib.Path(folder), list(range(len(windows)))))
        for peer, count in peers.items():
            for i in np.linspace(0, len(windows) - 1, count + 2).round().astype(int)[1:-1].tolist():
                with tempfile.TemporaryDirectory() as folder:
                    found[peer].append((1, *cut_theirs(path, windows[i], i, pathlib.Path(folder), peer)))
                    looks[peer].append(check(pathlib.Path(folder), [i]))
    result = {}
    for name, rows in found.items():
        clips, cpu_s, wall_s = np.sum(rows, axis=0)
        size, step = np.mean(looks[name], axis=0)
        result[name] = {"clips": int(clips), "clips_per_cpu_s": clips / cpu_s, "clips_per_wall_s": clips / wall_s,
                        "jpeg_bytes": size, "luma_step": step}  # fmt: skip
    return result


def memory(path: pathlib.Path, seconds: float, gap_s: float) -> list[dict]:
    """Returns the child's memory after each tenth of a file's clips: rows {"at_s", "clips", "resident_mb", "peak_mb"}."""
    windows = windows_at(np.arange(1.0, seconds - AFTER_S - 0.1, gap_s))
    rows, marks = [], np.linspace(0, len(windows) - 1, 11).round().astype(int)[1:].tolist()
    child = guard.ready()
    cuts = guard.cut_windows(path, windows, short_side_px=SHORT_SIDE_PX, quality=QUALITY, limits=guard.Limits())
    for n, (i, cut) in enumerate(cuts):
        if isinstance(cut, str):
            raise SystemExit(f"clip {i}: {cut}")
        if n in marks:
            status = dict(
                line.split(":", 1) for line in pathlib.Path(f"/proc/{child.pid}/status").read_text().splitlines()
            )
            held = {
                name: int(status[key].split()[0]) / 1024
                for name, key in (("resident_mb", "VmRSS"), ("peak_mb", "VmHWM"))
            }
            rows.append({"at_s": windows[i].start_s, "clips": n + 1, **held})
    return rows


def versions() -> dict[str, str]:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""),
        "python": platform.python_version(),
        "pyav": av.__version__,
        "its libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "ffmpeg": imageio_ffmpeg.get_ffmpeg_version(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clip_extraction", description=__doc__.split("\n")[0])
    parser.add_argument("--gaps", type=float, nargs="+", default=[2.7, 16.5, 30.0], help="seconds from one clip to the next")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the file")
    parser.add_argument(
        "--rounds", type=int, default=5, help="parts of the file, over which ours and the peers take turns"
    )
    parser.add_argument("--input_seeks", type=int, default=4, help="clips by input seek in each round and gap")
    parser.add_argument(
        "--output_seeks", type=int, default=1, help="clips by output seek in each round, first gap only"
    )
    parser.add_argument("--hours", type=float, help="measure memory along a file of this length instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="file for the numbers")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args(argv)
    told, rows = {"versions": versions()}, []
    with tempfile.TemporaryDirectory() as work:
        base, path = pathlib.Path(work) / "base.mp4", pathlib.Path(work) / "long.mp4"
        make_base(base, args.seed)
        seconds = 3600 * args.hours if args.hours else 60 * args.minutes
        lengthen(base, path, seconds)
        file = f"{seconds:g} s of video at {8 * path.stat().st_size / seconds / 1e6:.2f} Mbit/s"
        if args.hours:
            told["memory"] = memory(path, seconds, args.gaps[0])
            told["missed"] = [
                f"{row['peak_mb']:.0f} MiB, wanted {MEMORY_MB}" for row in told["memory"] if row["peak_mb"] > MEMORY_MB
            ][-1:]
            header, rows = list(MEMORY_COLUMNS), [_cells(MEMORY_COLUMNS, row) for row in told["memory"]]
        else:
            header = ["distance of the clips, s", "cut by", *COLUMNS, "goal"]
            told["speed"], told["missed"] = {}, []
            for n, gap_s in enumerate(args.gaps):
                peers = {"input seek": args.input_seeks, **({"output seek": args.output_seeks} if n == 0 else {})}
                found = told["speed"][gap_s] = measure(path, gap_s, args.rounds, peers, seconds)
                for name, row in found.items():
                    row["ours_over_it"] = found["ours"]["clips_per_cpu_s"] / row["clips_per_cpu_s"]
                    wanted = WANTED.get((gap_s, name), 0.0)
                    rows.append([f"{gap_s:g}", name, *_cells(COLUMNS, row), f"at least {wanted:g}" if wanted else ""])
                    print(rows[-1], file=sys.stderr, flush=True)
                    if row["ours_over_it"] < wanted:
                        told["missed"].append(f"{row['ours_over_it']:.2f} times {name} at {gap_s:g} s, wanted {wanted:g}")
    if args.json:
        args.json.write_text(json.dumps(told, indent=1))
    text = f"{file}; libavcodec {told['versions']['its libavcodec']}, ffmpeg {told['versions']['ffmpeg']}.\n\n"
    text += record.markdown(header, rows) + (f"\n\nMissed: {'; '.join(told['missed'])}." if told["missed"] else "")
    record.append("Clip extraction", text, "av", "imageio-ffmpeg", path=args.results)
    sys.exit(1 if told["missed"] else 0)


def _cells(columns: dict[str, str], row: dict[str, float]) -> list[str]:
    return [form.format(**row) for form in columns.values()]


if __name__ == "__main__":
    main()
