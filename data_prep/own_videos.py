"""Your own videos to clips: `python -m data_prep.own_videos --videos FOLDER --narrations MINE.csv --out CLIPS`.

With `--every_s SECONDS` in place of narrations, every video is cut into windows from beginning to end, for `mc3_jax.search`
to search. The windows have no text, so all of them become clips of the test split.

The CSV has the columns video, time_s, text and, if there are labels, label; see `data_prep.sources.own_csv`. All its rows are
used. Videos are split as `--splits` says. Videos it does not name are split by the hash of their name; but if any rows have
labels, videos with a label go to validation and test and the rest to training. Without taxonomies, verb and noun are unknown.
"""

import argparse

from data_prep import command, guard, narrated, narrations, shards, storage
from data_prep.sources import grid, own_csv
from mc3_jax import terminal
from mc3_jax.data import records

_MIN_EVERY_S, _MAX_EVERY_S = 0.05, 3600.0
_OF_NARRATIONS = ("splits", "max_train_clips", "sample_seed", "clean_text", "verbs", "nouns")  # options


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("own_videos", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--videos", required=True, type=storage.parse, help="folder of video files, in any format that FFmpeg reads")
    moments = parser.add_mutually_exclusive_group(required=True)
    moments.add_argument("--narrations", type=storage.parse, help="CSV with columns video, time_s, text and optionally label")
    moments.add_argument("--every_s", type=float, help="without narrations: cut a window every EVERY_S seconds")
    narrated.add_options(parser, "")
    parser.set_defaults(num_candidates=None)
    add(
        "--splits",
        type=storage.parse,
        help="CSV with columns video_uid, split, videos named as in --narrations; videos it does not name go to validation "
        "and test if they have labels, else to train; without any labels a hash decides",
    )
    add("--verbs", type=storage.parse, help="taxonomy of verbs, a CSV with columns label, group like Ego4D's; default: none")
    add("--nouns", type=storage.parse, help="the same for nouns")
    return parser


def convert(args: argparse.Namespace, beam_args: list[str]) -> records.ClipsInfo:
    """Converts the data that the command line names; returns the content of `clips.json`.

    Raises:
      ValueError: Bad options, missing or damaged files, or lost records.
    """
    # Data sets of windows have another name, so that windows and clips of narrations never replace each other in a folder.
    # One frame per interval is enough, since windows are not trained on, and evaluation and search use no more.
    is_grid = args.every_s is not None
    args.name = args.name or ("own_windows" if is_grid else "own_clips")
    args.num_candidates = (1 if is_grid else 4) if args.num_candidates is None else args.num_candidates
    narrated.check_options(args, beam_args)
    if not storage.is_folder(args.videos):
        raise ValueError(f"no folder {args.videos}: point --videos at the folder of your video files")
    verbs, nouns = (
        narrations.read_taxonomy(path) if path else narrations.Taxonomy([], {}) for path in (args.verbs, args.nouns)
    )
    if is_grid:
        moments, rejects = _read_grid(args)
        chosen = {name: moments if name == "test" else [] for name in records.SPLITS}
        num_in = len(moments) + len(rejects)
        return narrated.write_clips(args, beam_args, storage.absolute(args.videos), chosen, rejects, num_in, verbs, nouns)
    rows = own_csv.read(args.narrations, args.videos)
    splits = {}
    if args.splits:
        splits, missing = own_csv.read_own_splits(args.splits, args.videos)
        narrated.check_splits(args.splits, [*splits, *missing], splits, rows)
        if missing:
            first = terminal.printable(missing[0])
            print(f"{len(missing)} videos of {args.splits} are not in {args.videos}, the first is {first}")
    chosen, rejects = narrated.choose([], rows, splits, own_table=True, clean_text=args.clean_text)
    return narrated.write_clips(args, beam_args, storage.absolute(args.videos), chosen, rejects, len(rows), verbs, nouns)


def _read_grid(args: argparse.Namespace) -> tuple[list[narrations.Narration], list[shards.Reject]]:
    """Returns the moments at which `--every_s` cuts windows, and a reject for each video that has none.

    Raises:
      ValueError: The options contradict each other, or there are no videos.
    """
    if not _MIN_EVERY_S <= args.every_s <= _MAX_EVERY_S:
        raise ValueError(f"--every_s must be from {_MIN_EVERY_S:g} to {_MAX_EVERY_S:g} seconds, got {args.every_s:g}")
    given = [f"--{name}" for name in _OF_NARRATIONS if getattr(args, name)]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise ValueError(
            f"{', '.join(given)} {verb} only for --narrations: windows of --every_s have no text and all go to the test split"
        )
    if storage.is_remote(args.videos):
        raise ValueError(f"--every_s needs a local folder, but {args.videos} is in a bucket: copy or mount it")
    limits = guard.Limits(*args.cpu_limit, args.memory_limit)
    moments, rejects = grid.read(args.videos, args.every_s, tuple(args.window), limits)
    if not moments and not rejects:
        raise ValueError(f"no video files in {args.videos}: looked for {' '.join(sorted(grid.SUFFIXES))}")
    return moments, rejects


def main(argv: list[str] | None = None) -> None:
    """Runs the command; after an error the process ends with one line and status 2."""
    command.run(_parser(), convert, argv)


if __name__ == "__main__":
    main()
