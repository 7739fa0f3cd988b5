"""Your own videos to clips: `python -m data_prep.own_videos --videos FOLDER --narrations MINE.csv --out CLIPS`.

The CSV has the columns video, time_s, text and, if there are labels, label; see `data_prep.sources.own_csv`. All its rows are
taken. Videos are split by the hash of their name or as `--splits` says. Without taxonomies, no verb and noun is told.
"""

import argparse

from data_prep import command, narrated, narrations, storage
from data_prep.sources import own_csv
from mc3_jax.data import records


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("own_videos", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--videos", required=True, type=storage.parse, help="folder of video files, of any kind that FFmpeg knows")
    add("--narrations", required=True, type=storage.parse, help="CSV with columns video, time_s, text and maybe label")
    narrated.add_options(parser, "own_clips")
    add("--splits", type=storage.parse, help="CSV video_uid,split, videos named as in --narrations; default by hash")
    add("--verbs", type=storage.parse, help="taxonomy CSV label,group, as Ego4D's; default none")
    add("--nouns", type=storage.parse, help="the same for nouns")
    return parser


def convert(args: argparse.Namespace, beam_args: list[str]) -> records.ClipsInfo:
    """Converts what the command line names; returns what `clips.json` says.

    Raises:
      ValueError: Bad options, missing or damaged files, or lost records.
    """
    narrated.check_options(args, beam_args)
    if not storage.is_folder(args.videos):
        raise ValueError(f"no folder {args.videos}: point --videos at the folder of your video files")
    verbs, nouns = (
        narrations.read_taxonomy(path) if path else narrations.Taxonomy([], {}) for path in (args.verbs, args.nouns)
    )
    rows = own_csv.read(args.narrations, args.videos)
    splits = own_csv.read_own_splits(args.splits, args.videos) if args.splits else {}
    # As a label list, for that is taken whole.
    chosen, rejects = narrated.choose([], rows, splits, clean_text=args.clean_text)
    return narrated.write_clips(args, beam_args, storage.absolute(args.videos), chosen, rejects, len(rows), verbs, nouns)


def main(argv: list[str] | None = None) -> None:
    """Converts, or ends with one line and status 2."""
    command.run(_parser(), convert, argv)


if __name__ == "__main__":
    main()
