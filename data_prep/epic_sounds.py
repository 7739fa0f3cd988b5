"""EPIC-Sounds to clips: `python -m data_prep.epic_sounds --annotations DIR --audio EPIC_audio.hdf5 --out CLIPS`.

`--audio` is the HDF5 file of 24 kHz sound, a folder of wav, flac or other sound files, or a folder of EPIC-Kitchens videos,
as `P01_01.*`, `P01/P01_01.*` or `P01/videos/P01_01.*`. Segments are stored as sound only; `--frames` adds pictures from the
videos.
"""

import argparse
import dataclasses
from collections.abc import Callable

from data_prep import command, sounds, storage, video_files
from data_prep.sources import epic_sounds
from mc3_jax.data import records

_HDF5 = b"\x89HDF\r\n\x1a\n"  # first bytes of an HDF5 file


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("epic_sounds", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--annotations", required=True, nargs="+", type=storage.parse,
        help=f"folder with the annotation files, or the files themselves: {', '.join(epic_sounds.FILES)}")  # fmt: skip
    add("--audio", required=True, type=storage.parse, help="EPIC_audio.hdf5, or a folder of sound files or videos")
    add("--frames", action="store_true", help="also store video frames of each segment; needs videos")
    sounds.add_options(parser, "epic_sounds")
    command.add_picture_options(parser)
    return parser


def convert(args: argparse.Namespace, beam_args: list[str]) -> records.ClipsInfo:
    """Converts the data that the command line names; returns the content of `clips.json`.

    Raises:
      ValueError: Bad options, missing or damaged files, or lost records.
    """
    sounds.check_options(args, beam_args)
    command.check_picture_options(args)
    hdf5 = _is_hdf5(args.audio)
    if hdf5 and args.frames:
        raise ValueError(f"--frames needs videos, but {args.audio} holds only sound")
    found, classes = epic_sounds.read(epic_sounds.find_files(args.annotations))
    media_dir = args.audio.parent if hdf5 else args.audio
    if hdf5:
        found = [dataclasses.replace(sound, file=args.audio.name, hdf5_name=sound.recording) for sound in found]
    else:
        places: dict[str, tuple[str, str]] = {}
        find = video_files.finder(media_dir, ("video", "audio") if args.frames else ("audio",))
        for i, sound in enumerate(found):
            if sound.problem:
                continue
            if sound.recording not in places:
                places[sound.recording] = _find(find, sound.recording)
            file, problem = places[sound.recording]
            found[i] = dataclasses.replace(sound, file=file, problem=problem)
    return sounds.write_clips(
        args, beam_args, storage.absolute(media_dir), found, classes, pictures=args.frames,
        hdf5_rate_hz=epic_sounds.ANNOTATED_RATE_HZ,
    )  # fmt: skip


def _is_hdf5(path: storage.Path) -> bool:
    """Returns True for an HDF5 file and False for a folder.

    Raises:
      ValueError: The path is neither.
    """
    if not storage.is_file(path):
        if storage.is_folder(path):
            return False
        raise ValueError(f"no file or folder {path}: point --audio at EPIC_audio.hdf5 or a folder of sound files or videos")
    if storage.head(path, len(_HDF5)) != _HDF5:
        raise ValueError(f"{path} is not an HDF5 file: point --audio at EPIC_audio.hdf5 or at a folder")
    return True


def _find(find: Callable[[str], tuple[str, str]], video: str) -> tuple[str, str]:
    """Returns (file inside the folder, "") of a video, at any path that EPIC-Kitchens' downloads use; or (name, reason)."""
    participant = video.split("_")[0]
    problem = video_files.MISSING
    for place in (f"{participant}/videos/{video}", f"{participant}/{video}", video):
        file, problem = find(place)
        if problem != video_files.MISSING:
            break
    if problem.startswith(video_files.SEVERAL):  # the usual advice doesn't fit: the annotations have no suffixes
        problem = f"{video_files.SEVERAL}: keep only one"
    return (file if not problem else video), problem


def main(argv: list[str] | None = None) -> None:
    """Runs the command; after an error the process ends with one line and status 2."""
    command.run(_parser(), convert, argv)


if __name__ == "__main__":
    main()
