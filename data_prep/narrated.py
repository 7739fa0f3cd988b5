"""Makes clips of narrated moments in videos: chooses the narrations, assigns videos to shards, and cuts the clips.

Shared by `data_prep.ego4d` and `data_prep.own_videos`. Only `data_prep.guard` opens media files.
"""

import argparse
import collections
import itertools
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator

from data_prep import command, media, narrations, shards, storage, video_files
from data_prep.windows import Window, frame_times, num_samples
from mc3_jax import terminal
from mc3_jax.data import records

_MAX_WINDOW_S = 60.0  # pieces of shards and batches would become too large long before


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options of narrated clips and those that all commands share; `name` is the data set's default name."""
    command.add_options(parser, name)
    command.add_picture_options(parser)
    add = parser.add_argument
    add("--clean_text", action="store_true", help="store narrations without tags (#C C, #unsure) and superfluous white space")
    add(
        "--window", nargs=2, type=float, default=(0.5, 1.0), metavar=("BEFORE", "AFTER"),
        help="seconds of a clip before and after its narration's time (default 0.5 1.0)",
    )  # fmt: skip
    add(
        "--max_train_clips", type=int, default=0,
        help="sample this many of the narrations for training (the paper: 250000); 0 takes all",
    )  # fmt: skip
    add("--sample_seed", type=int, default=0, help="seed of the random sample of --max_train_clips")


def check_options(args: argparse.Namespace, beam_args: list[str]) -> None:
    """Checks the options of `add_options`.

    Raises:
      ValueError: One of them is wrong, or Beam's job server or Docker does not answer.
    """
    command.check_options(args, beam_args)
    command.check_picture_options(args)
    if not (min(args.window) >= 0 and 0 < sum(args.window) <= _MAX_WINDOW_S):
        raise ValueError(
            f"--window must not be negative, empty or longer than {_MAX_WINDOW_S:g} s, got {tuple(args.window)}"
        )
    if args.max_train_clips < 0:
        raise ValueError(f"--max_train_clips must be at least 1, or 0 for all, got {args.max_train_clips}")


def make_clips(item: dict, settings: dict) -> Iterator[records.Clip | shards.Reject]:
    """Yields a clip or a reject for every narration of a video.

    Args:
      item: {"video_uid", "narrations": [{"clip_id", "source", "time_s", "text", "label", "verb_id", "noun_id"}]}, and
        "stereo" for a video whose pictures hold two views; made by `plan_tasks`.
      settings: Settings of the conversion, made by `write_clips`.
    """
    uid, lines = item["video_uid"], item["narrations"]
    before, after = settings["window_s"]
    windows = []
    for line in lines:
        start, stop = line["time_s"] - before, line["time_s"] + after
        times = frame_times(start, stop, settings["num_intervals"], settings["num_candidates"])
        windows.append(Window(start, stop, times))
    stereo = item.get("stereo", False)
    for i, cut in video_files.cut_windows(settings["video_dir"], uid, windows, settings, stereo=stereo):
        line = lines[i]
        if isinstance(cut, str):
            yield shards.Reject(line["clip_id"], uid, *video_files.reason_of(cut, item))
            continue
        yield records.Clip(
            clip_id=line["clip_id"],
            video_uid=uid,
            narration=line["text"],
            source=line["source"],
            time_us=round(line["time_s"] * 1e6),
            start_us=round(windows[i].start_s * 1e6),
            stop_us=round(windows[i].stop_s * 1e6),
            frames=cut.frames,
            frame_times_us=cut.frame_times_us,
            frame_height=cut.height,
            frame_width=cut.width,
            audio=cut.audio,
            verb_id=line["verb_id"],
            noun_id=line["noun_id"],
            label=line["label"],
        )


def choose(
    found: list[narrations.Narration],
    labelled: list[narrations.Narration],
    splits: dict[str, str],
    *,
    own_table: bool = False,
    groups: dict[str, str] | None = None,
    clean_text: bool = False,
) -> tuple[dict[str, list[narrations.Narration]], list[shards.Reject]]:
    """Returns the narrations chosen for each split, and a reject for every other row of the two lists.

    Training takes narrations of the camera wearer's actions, from both lists. Validation and test take all rows of the label
    list and nothing else; without a label list they take the camera wearer's narrations. Of narrations with the same video,
    time and text only one is chosen: the label list's if there is one, or else the first. A narration that is rejected for
    another reason does not displace its duplicates.

    Args:
      found: All narrations.
      labelled: The label list. If labels for the same video, time and text contradict each other, their rows are rejected.
      splits: Video uid → split. Other videos go to validation or test by the hash of their uid if they are in the label list,
        and to training if not. Without a label list, all other videos are split by the hash of their uid.
      own_table: Whether `labelled` is the user's own table. Then all its rows are taken, whoever acts, and a video counts as
        part of the label list only if one of its rows has a label.
      groups: Video uid → uid that stands for a group of videos of the same moments. A video that `splits` lacks goes where
        `splits` puts others of its group, and not to training if one of them is held out. If `splits` has none of them, they
        are split together by the hash of that uid, as part of the label list if any of them is in it.
      clean_text: Whether clips will hold cleaned texts, see `plan_tasks`.
    """
    chosen: dict[str, list[narrations.Narration]] = {name: [] for name in records.SPLITS}
    rejects = []
    labels = collections.defaultdict(set)
    for narration in labelled:
        if _problem(narration, clean_text) is None and narration.label != records.UNKNOWN:
            labels[_moment(narration)].add(narration.label)
    listed = {n.video_uid for n in labelled if not own_table or n.label != records.UNKNOWN}
    split_of = _splitter(splits, listed, groups or {})
    taken: dict[tuple[str, int, str], bool] = {}  # moment of a chosen narration → whether it is from the label list
    ids: set[str] = set()
    for narration, in_list in itertools.chain(((n, True) for n in labelled), ((n, False) for n in found)):
        clip_id, split, moment = narration.clip_id, "", ("", 0, "")
        reason = _problem(narration, clean_text)
        if reason is None:  # only without a problem can uid and text be encoded
            moment = _moment(narration)
            split = split_of(narration.video_uid)
            reason = _gives_way(narration, in_list, labels[moment], taken.get(moment))
        if reason is None and not in_list:
            reason = _not_wanted(narration, split if labelled else "train")
        elif reason is None and split == "train" and not own_table:
            reason = _not_wanted(narration, split)
        if reason is None and clip_id in ids:  # possible if uids contain "_" or hashes collide
            reason = "another narration has this id"
        if reason:
            rejects.append(shards.Reject(clip_id, narration.video_uid, reason))
        else:
            taken[moment] = in_list
            ids.add(clip_id)
            chosen[split].append(narration)
    return chosen, rejects


def _gives_way(
    narration: narrations.Narration, in_list: bool, labels: set[int], chosen_in_list: bool | None
) -> str | None:
    """Returns why another row of the same moment makes this one superfluous, or None.

    Args:
      narration: Of the row.
      in_list: Whether the row is of the label list.
      labels: All labels that the label list has for this moment.
      chosen_in_list: Whether the row that was chosen for this moment is of the label list; None if none was chosen yet.
    """
    if in_list and len(labels) > 1:
        return "labels contradict each other"
    if in_list and narration.label == records.UNKNOWN and labels:
        return "same narration twice"  # the row with the label is chosen, wherever it stands
    if chosen_in_list is None:
        return None
    return "is also in the label list" if chosen_in_list and not in_list else "same narration twice"


def check_splits(
    path: storage.Path, named: Collection[str], splits: dict[str, str], rows: list[narrations.Narration]
) -> None:
    """Checks that a file of splits is about the narrations' videos, and prints how many of these it does not name.

    Args:
      path: File of splits.
      named: Videos that the file names.
      splits: Video uid → split of all videos whose split is given, by the file or otherwise.
      rows: Narrations.

    Raises:
      ValueError: The file names none of the videos, e.g. because of other suffixes, and so would have no effect.
    """
    uids = {n.video_uid for n in rows if not n.problem}
    others = uids - splits.keys()
    if others and uids.isdisjoint(named):
        first = f"it begins with {next(iter(named))!r}" if named else "it is empty"
        raise ValueError(
            f"{path} names none of the narrations' videos: {first}, the narrations name {min(uids)!r}: write the names "
            "the same way in both files"
        )
    if others:
        print(f"{len(others)} of {len(uids)} videos are not in {path}: they are split as if there were no such file")


def _splitter(splits: dict[str, str], listed: set[str], groups: dict[str, str]) -> Callable[[str], str]:
    """Returns a function video uid → its split; `listed` are the videos of the label list, the rest is as for `choose`."""
    in_group: dict[str, str] = {}
    for uid, split in splits.items():
        group = groups.get(uid, uid)
        if in_group.get(group, "train") == "train":  # one that is held out decides
            in_group[group] = split
    listed_groups = {groups.get(uid, uid) for uid in listed}

    def split_of(uid: str) -> str:
        group = groups.get(uid, uid)
        split = splits.get(uid) or in_group.get(group)
        if split:
            return split
        if group in listed_groups:
            return narrations.held_out_by_hash(group)  # labels are of no use in training
        return "train" if listed else narrations.split_by_hash(group)

    return split_of


def _moment(narration: narrations.Narration) -> tuple[str, int, str]:
    """Returns the key by which narrations are duplicates: video, time in µs and words, tags included."""
    return narration.video_uid, round(narration.time_s * 1e6), narration.words


def _problem(narration: narrations.Narration, clean_text: bool) -> str | None:
    """Returns the reason why a narration can't become a clip in any split, or None if it can."""
    problem = narration.problem or video_files.problem_of(narration.video_uid)
    if problem:
        return problem
    if not (narrations.clean(narration.text) if clean_text else narration.words):
        return "narration has no text"
    if re.search("[\ud800-\udfff]", narration.annotation_uid + narration.source + narration.text):
        return "narration is not valid Unicode"  # lone surrogates: JSON can escape them, but UTF-8 files can't hold them
    return None if math.isfinite(narration.time_s) else "narration has no time"


def _not_wanted(narration: narrations.Narration, split: str) -> str | None:
    """Returns the reason why a narration is not taken into a split, or None. It must have no label, except for "train"."""
    speaker = narrations.who(narration.text)
    if speaker != "wearer":
        return {"other": "somebody else's action", "unsure": "narrator is unsure"}.get(speaker, "no tag says who acts")
    return None if split == "train" else f"no label, but in the {split} split"


def plan_tasks(
    chosen: dict[str, list[narrations.Narration]],
    verbs: narrations.Taxonomy,
    nouns: narrations.Taxonomy,
    num_shards: int,
    video_dir: storage.Path,
    *,
    stereo: Collection[str] = (),
    clean_text: bool = False,
) -> list[shards.ShardTask]:
    """Returns the shards to write: about `num_shards` in all, distributed over the splits by their number of clips.

    Each split that has videos gets at least one shard. A shard's task holds size and version of its video files, so a rerun
    after videos were added or replaced redoes their shards.

    Args:
      chosen: Narrations of each split, see `choose`.
      verbs, nouns: Taxonomies, maybe empty.
      num_shards: Number of shards over all splits.
      video_dir: Folder of the videos.
      stereo: Uids of the videos whose pictures hold two views.
      clean_text: Whether to remove tags and superfluous white space from the texts.
    """
    total = sum(map(len, chosen.values()))
    facts = video_files.facts(video_dir)
    tasks = []
    for split, lines in chosen.items():
        by_video = collections.defaultdict(list)
        for n in lines:
            verb_id, noun_id = narrations.find_verb_and_noun(n.text, verbs, nouns, n.verb_tags, n.noun_tags)
            text = narrations.clean(n.text) if clean_text else n.text
            by_video[n.video_uid].append(
                {"clip_id": n.clip_id, "source": n.source, "time_s": n.time_s, "text": text, "label": n.label,
                 "verb_id": verb_id, "noun_id": noun_id}
            )  # fmt: skip
        count = max(round(num_shards * len(lines) / max(total, 1)), 1)
        groups = shards.assign_shards(list(by_video), count)
        for i, uids in enumerate(groups):
            items = tuple(
                # Only stereoscopic videos have this entry, so that finished shards without any are kept.
                {"video_uid": uid, **facts(uid), "narrations": by_video[uid], **({"stereo": True} if uid in stereo else {})}
                for uid in uids
            )
            count_in = sum(len(item["narrations"]) for item in items)
            tasks.append(shards.ShardTask(split, i, len(groups), items, count_in))
    return tasks


def _tell_if_all_miss(tasks: list[shards.ShardTask], video_dir: storage.Path) -> None:
    """Warns where no video is there: to reject millions of narrations one by one takes an hour."""
    items = [item for task in tasks for item in task.items]
    if items and all(item["video_bytes"] is None for item in items):
        first = terminal.printable(items[0]["video_uid"])
        print(
            f"warning: none of {len(items)} videos is in {video_dir}, the first is {first}: is it the right folder?",
            file=sys.stderr,
        )


def write_clips(
    args: argparse.Namespace,
    beam_args: list[str],
    video_dir: storage.Path,
    chosen: dict[str, list[narrations.Narration]],
    rejects: list[shards.Reject],
    num_in: int,
    verbs: narrations.Taxonomy,
    nouns: narrations.Taxonomy,
    *,
    stereo: Collection[str] = (),
) -> records.ClipsInfo:
    """Writes the data set of the chosen narrations; see `command.write`.

    Args:
      args: Parsed options, those of `add_options` among them. At most `max_train_clips` of the training narrations are
        written, if that is not 0.
      beam_args: Beam's own options.
      video_dir: Folder of the videos, an absolute path or in a bucket.
      chosen, rejects: See `choose`.
      num_in: Number of rows read, of the label list too. Clips and rejects must add up to it.
      verbs, nouns: Taxonomies, maybe empty.
      stereo: Uids of the videos whose pictures hold two views; clips get the left one.

    Raises:
      ValueError: There is nothing to write, or records were lost.
    """
    train, others = narrations.sample(chosen["train"], args.max_train_clips, args.sample_seed)
    chosen = chosen | {"train": train}
    rejects = rejects + [shards.Reject(n.clip_id, n.video_uid, "not sampled") for n in others]
    num_shards = command.num_shards(args, sum(map(len, chosen.values())))
    tasks = plan_tasks(chosen, verbs, nouns, num_shards, video_dir, stereo=stereo, clean_text=args.clean_text)
    _tell_if_all_miss(tasks, video_dir)
    settings = {
        "cutting": media.VERSION, "video_dir": str(video_dir), "window_s": list(args.window),
        "num_intervals": args.num_intervals, "num_candidates": args.num_candidates, "short_side_px": args.short_side,
        "jpeg_quality": args.jpeg_quality, "cpu_limit_s": list(args.cpu_limit), "memory_limit_mb": args.memory_limit,
    }  # fmt: skip
    info = records.ClipsInfo(
        name=args.name, window_s=tuple(args.window), num_intervals=args.num_intervals,
        num_candidates=args.num_candidates, short_side_px=args.short_side, canvas_px=(args.short_side, args.short_side),
        num_samples=num_samples(sum(args.window)), verbs=verbs.labels, nouns=nouns.labels, splits={},
    )  # fmt: skip
    return command.write(args, beam_args, tasks, make_clips, settings, info, rejects, num_in)
