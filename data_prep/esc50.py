"""ESC-50 or ESC-10 to clips: `python -m data_prep.esc50 --root ESC-50 --out CLIPS`.

The folder has the layout of the download: `meta/esc50.csv` (or ESC-10's `meta/esc10.csv`) and the recordings in `audio`.
Every file is stored whole, with its class and its fold, so that one conversion is enough for cross-validation over the folds.
"""

import argparse

from data_prep import command, sounds, storage
from data_prep.sources import esc50
from mc3_jax.data import records


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("esc50", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--root", required=True, type=storage.parse, help="folder with meta/esc50.csv or meta/esc10.csv and audio/")
    add("--esc10", action="store_true", help="use only the rows of ESC-10 and renumber its classes")
    add("--test_fold", type=int, default=5, help="fold that becomes the test split; 0 for none")
    add("--validation_fold", type=int, default=4, help="fold that becomes the validation split; 0 for none")
    sounds.add_options(parser, "esc50")
    return parser


def convert(args: argparse.Namespace, beam_args: list[str]) -> records.ClipsInfo:
    """Converts the data that the command line names; returns the content of `clips.json`.

    Raises:
      ValueError: Bad options, missing or damaged files, or lost records.
    """
    sounds.check_options(args, beam_args)
    if min(args.test_fold, args.validation_fold) < 0 or args.test_fold == args.validation_fold != 0:
        raise ValueError(
            f"--test_fold and --validation_fold must be different folds, or 0 for none, got {args.test_fold} and "
            f"{args.validation_fold}"
        )
    if not storage.is_folder(args.root):
        raise ValueError(f"no folder {args.root}: point --root at the folder of ESC-50 or ESC-10")
    found, classes = esc50.read(
        args.root, esc10=args.esc10, test_fold=args.test_fold, validation_fold=args.validation_fold
    )
    return sounds.write_clips(args, beam_args, storage.absolute(args.root / "audio"), found, classes)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; after an error the process ends with one line and status 2."""
    command.run(_parser(), convert, argv)


if __name__ == "__main__":
    main()
