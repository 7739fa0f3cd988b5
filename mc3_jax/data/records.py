"""The schema of a clip on disk: `Clip` <-> `tf.train.Example` bytes, and `clips.json`. Imports numpy and protobuf only.

`data_prep` writes these records into ArrayRecord shards and the loader reads them, both without TensorFlow; TFDS can read
them too (`data_prep.shards.feature_spec`). The message types are built here from the field numbers in TensorFlow's public
`example.proto` and `feature.proto`. They have a descriptor pool of their own, so they never collide with a TensorFlow that
somebody else imports.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from jaxtyping import Int64

SCHEMA_VERSION = 3
CLIPS_FILE = "clips.json"
REJECTED_FILE = "rejected.jsonl"  # the annotations that gave no clip, and why
SAMPLE_RATE_HZ = 16_000
SPLITS = ("train", "validation", "test")
_DIGEST = "sha256"  # key of the digest in `CLIPS_FILE`
UNKNOWN = -1  # value of verb_id, noun_id, label, class_id and fold if they are not known


@dataclasses.dataclass
class Clip:
    """A narrated moment of a video with the frames and the sound around it, or an annotated sound with or without frames.

    Attributes:
      clip_id: Unique id in the data set.
      video_uid: Id of the video that the clip was cut from.
      narration: Raw text, including tags such as "#C C". For a sound, its name, or "" if it has none.
      source: Where the narration came from, e.g. "narration_pass_1".
      time_us, start_us, stop_us: The narrated moment and the window [start, stop) around it, in µs from the start of the
        video. The moment of a sound is its start.
      frames: T * C JPEG files, interval-major: candidate c of interval t is `frames[t * C + c]`. The candidate in the
        middle of its interval is c = C // 2. Empty if the data set holds no frames.
      frame_times_us: int64 [T * C], when each frame is shown, in µs from the start of the video.
      frame_height, frame_width: Size of the JPEG files in px; 0 if there are none.
      audio: int16 [samples], mono, 16 kHz; see `ClipsInfo.max_samples`.
      verb_id, noun_id: Index into `ClipsInfo.verbs` and `.nouns`, -1 if unknown.
      label: Whether the narrated action is both seen and heard: 1 yes, 0 no, -1 not annotated.
      class_id: Index into `ClipsInfo.classes`, -1 if unknown.
      fold: Fold of the data set's own cross-validation, -1 if it has none.
    """

    clip_id: str
    video_uid: str
    narration: str
    source: str
    time_us: int
    start_us: int
    stop_us: int
    frames: Sequence[bytes]
    frame_times_us: Int64[np.ndarray, " n"]
    frame_height: int
    frame_width: int
    audio: np.ndarray
    verb_id: int = UNKNOWN
    noun_id: int = UNKNOWN
    label: int = UNKNOWN
    class_id: int = UNKNOWN
    fold: int = UNKNOWN


_TEXTS = ("clip_id", "video_uid", "narration", "source")
_INTEGERS = (
    "time_us", "start_us", "stop_us", "frame_height", "frame_width", "verb_id", "noun_id", "label", "class_id", "fold",
)  # fmt: skip


def _build_message_classes() -> list[type[message.Message]]:
    """Returns the class of tf.train.Example, then those of the messages inside it, built from their field numbers."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mc3_example.proto", package="tensorflow", syntax="proto3")

    def add(parent, name, number, kind, *, repeated=False, type_name=None, oneof=False):
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        one = parent.field.add(name=name, number=number, type=kind, label=label)
        if type_name:
            one.type_name = f".tensorflow.{type_name}"
        if oneof:
            one.oneof_index = 0

    for name, kind in (
        ("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT), ("Int64List", field.TYPE_INT64),
    ):  # fmt: skip
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), start=1
    ):
        add(feature, name, number, field.TYPE_MESSAGE, type_name=kind, oneof=True)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, type_name="Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, repeated=True, type_name="Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, type_name="Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("Example", "Features", "Features.FeatureEntry", "Feature", "BytesList", "FloatList", "Int64List")
    return [message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tensorflow.{name}")) for name in names]


# The inner classes are kept, too. Otherwise protobuf makes each on first use and the garbage collector frees it again, which
# crashes the process with a segmentation fault if other threads are decoding (protobuf 6.33).
_Example, *_INNER = _build_message_classes()


def encode(clip: Clip) -> bytes:
    """Returns the clip as a serialised tf.train.Example; equal clips give equal bytes.

    Raises:
      ValueError: The audio isn't int16 mono, or the number of frames isn't that of their times.
    """
    if clip.audio.dtype != np.int16 or clip.audio.ndim != 1:
        raise ValueError(
            f"clip {clip.clip_id}: audio must be int16 [samples], got {clip.audio.dtype} {clip.audio.shape}"
        )
    if len(clip.frames) != len(clip.frame_times_us):
        raise ValueError(f"clip {clip.clip_id}: {len(clip.frames)} frames but {len(clip.frame_times_us)} frame times")
    example = _Example()
    feature = example.features.feature
    for name in _TEXTS:
        feature[name].bytes_list.value.append(getattr(clip, name).encode())
    for name in _INTEGERS:
        feature[name].int64_list.value.append(int(getattr(clip, name)))
    feature["frames"].bytes_list.value.extend(clip.frames)
    feature["frame_times_us"].int64_list.value.extend(int(t) for t in clip.frame_times_us)
    # An empty list is written with its type, too, which `decode` checks.
    feature["frames"].bytes_list.SetInParent()
    feature["frame_times_us"].int64_list.SetInParent()
    feature["audio"].bytes_list.value.append(clip.audio.astype("<i2", copy=False).tobytes())
    return example.SerializeToString(deterministic=True)


def decode(record: bytes) -> Clip:
    """Returns the clip in a serialised tf.train.Example. Unknown features are ignored; a missing one is an error.

    Raises:
      ValueError: The bytes aren't a tf.train.Example, or a feature is missing, of another type or of another length.
    """
    try:
        example = _Example.FromString(record)
    except message.DecodeError as error:
        raise ValueError(f"record of {len(record)} bytes is not a tf.train.Example: {error}") from error
    feature = example.features.feature

    def values(name: str, kind: str, num: int | None = None):
        if name not in feature:
            raise ValueError(f"record lacks the feature {name!r}; it has {sorted(feature) or 'none'}")
        found = getattr(feature[name], kind).value
        if not found and feature[name].WhichOneof("kind") != kind:
            raise ValueError(f"feature {name!r} must be {kind}, got {feature[name].WhichOneof('kind')}")
        if num is not None and len(found) != num:
            raise ValueError(f"feature {name!r} must hold {num} value(s), got {len(found)}")
        return found

    fields = {name: values(name, "bytes_list", 1)[0].decode() for name in _TEXTS}
    fields |= {name: values(name, "int64_list", 1)[0] for name in _INTEGERS}
    frames = values("frames", "bytes_list")  # as protobuf's sequence: a frame is copied out of it when it is asked for
    times = np.array(values("frame_times_us", "int64_list", len(frames)), np.int64)
    pcm = values("audio", "bytes_list", 1)[0]
    if len(pcm) % 2:
        raise ValueError(f"feature 'audio' must hold int16 samples, got {len(pcm)} bytes")
    audio = np.frombuffer(pcm, "<i2").astype(np.int16, copy=False)
    return Clip(frames=frames, frame_times_us=times, audio=audio, **fields)


def manifest(values: dict) -> str:
    """Returns the text of `clips.json`, which holds `values`, the fields of `ClipsInfo`, and their SHA-256."""
    return json.dumps(values | {_DIGEST: _digest(values)}, indent=1) + "\n"


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass
class Shard:
    """One file of a split.

    Attributes:
      file: Name of the file inside the data set's folder.
      num_clips, bytes: Number of records and size of the file in bytes.
      sha256: SHA-256 of the file, hexadecimal.
      video_clips: Number of clips of each video, in the order of the records.
      clip_samples: Number of audio samples of each clip, in the order of the records; empty if all clips have
        `ClipsInfo.num_samples`.
    """

    file: str
    num_clips: int
    bytes: int
    sha256: str
    video_clips: list[int]
    clip_samples: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SplitInfo:
    """A split's counts and files.

    Attributes:
      num_clips: Number of records in all shards.
      num_labelled, num_positive: Number of clips with a label, and with label 1.
      shards: The shards in order; the index of a clip in the split counts through them.
    """

    num_clips: int
    num_labelled: int
    num_positive: int
    shards: list[Shard]


@dataclasses.dataclass
class ClipsInfo:
    """Content of `clips.json`, which describes a data set.

    Attributes:
      name: Name of the data set; names of shard files begin with it.
      window_s: Seconds of a clip (before, after) the narrated moment.
      num_intervals, num_candidates: T and C: a clip holds T * C frames. If clips have no frames, both are 0, and so are the
        next two fields.
      short_side_px: Length that the short side of frames was scaled to.
      canvas_px: (height, width) of a canvas that holds every frame.
      num_samples: Audio samples per clip that a reader returns by default.
      verbs, nouns: Taxonomy labels; `Clip.verb_id` and `.noun_id` index them.
      splits: Counts and files of each split by its name; a split without clips has no shards.
      classes: Names of the classes; `Clip.class_id` indexes them.
      max_samples: Largest number of audio samples of a clip: clips have 1 to `max_samples` of them, fewer or more than
        `num_samples`. 0 if every clip has `num_samples`.
      num_annotations, num_rejected: Number of annotations, and of those that gave no clip. Each of the latter is a row of
        `REJECTED_FILE`.
      files: SHA-256, hexadecimal, of each other file by its name.
      sample_rate_hz: Sample rate of the audio.
      schema_version: Version of the format of the records and of this file.
    """

    name: str
    window_s: tuple[float, float]
    num_intervals: int
    num_candidates: int
    short_side_px: int
    canvas_px: tuple[int, int]
    num_samples: int
    verbs: list[str]
    nouns: list[str]
    splits: dict[str, SplitInfo]
    classes: list[str] = dataclasses.field(default_factory=list)
    max_samples: int = 0
    num_annotations: int = 0
    num_rejected: int = 0
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    sample_rate_hz: int = SAMPLE_RATE_HZ
    schema_version: int = SCHEMA_VERSION

    def dump(self, folder: str | os.PathLike) -> None:
        """Writes `clips.json` atomically: a reader sees the old file or the new one."""
        path = pathlib.Path(folder) / CLIPS_FILE
        aside = path.with_suffix(".json.tmp")
        aside.write_text(manifest(dataclasses.asdict(self)))
        os.replace(aside, path)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ClipsInfo":
        """Returns the content of `clips.json` in `folder`.

        Raises:
          ValueError: The folder is in a bucket, the folder or the file does not exist, or the file is no JSON, has another
            schema version, is incomplete or was changed since it was written.
        """
        if "://" in os.fspath(folder):
            raise ValueError(f"{folder} is in a bucket: clips are read from a local folder, so copy or mount it")
        path = pathlib.Path(folder) / CLIPS_FILE
        if path.parent.is_file():
            raise ValueError(f"no data folder {path.parent}: it is a file, name the folder of the data set")
        if not path.parent.is_dir():
            raise ValueError(f"no data folder {path.parent}: make it with `python -m data_prep.ego4d --out {folder}`")
        if not path.is_file():
            raise ValueError(
                f"{path.parent} holds no {CLIPS_FILE}: not a clips data set, or its conversion didn't finish"
            )
        try:
            values = json.loads(path.read_text())
            version = values["schema_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} can't be read: {type(error).__name__}: {error}") from error
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}: convert again")
        stated = values.pop(_DIGEST, None)
        if stated != _digest(values):
            raise ValueError(f"{path} is damaged: its content does not match its SHA-256 {stated!r:.80}: convert again")
        try:
            values["window_s"], values["canvas_px"] = tuple(values["window_s"]), tuple(values["canvas_px"])
            values["splits"] = {
                name: SplitInfo(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
                for name, split in values["splits"].items()
            }
            info = cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is incomplete: {error}: convert again") from error
        wrong = info._find_wrong_field()
        if wrong:
            raise ValueError(f"{path} is damaged: {wrong}: convert again")
        return info

    def _find_wrong_field(self) -> str | None:
        """Returns the first field whose value no conversion can have written, with that value, or None if all are valid."""

        def is_count(value, least: int = 0, most: int = 1 << 62) -> bool:
            return type(value) is int and least <= value <= most

        def are_texts(value) -> bool:
            return isinstance(value, list) and all(isinstance(text, str) for text in value)

        holds = {
            "name": isinstance(self.name, str), "verbs": are_texts(self.verbs), "nouns": are_texts(self.nouns),
            "classes": are_texts(self.classes), "max_samples": is_count(self.max_samples, 0, 1 << 31),
            "num_annotations": is_count(self.num_annotations), "num_rejected": is_count(self.num_rejected),
            "files": isinstance(self.files, dict) and are_texts(list(self.files.values())),
            "window_s": len(self.window_s) == 2 and all(type(s) in (int, float) for s in self.window_s),
        }  # fmt: skip
        # Either all fields about frames are 0 or none is.
        least, most = (0, 0) if self.num_intervals == 0 else (1, 1 << 31)
        for field in ("num_intervals", "num_candidates", "short_side_px"):
            holds[field] = is_count(getattr(self, field), least, most)
        holds["canvas_px"] = len(self.canvas_px) == 2 and all(is_count(p, least, min(most, 65535)) for p in self.canvas_px)
        for field in ("num_samples", "sample_rate_hz"):
            holds[field] = is_count(getattr(self, field), 1, 1 << 31)
        for field, held in holds.items():
            if not held:
                return f"{field} is {getattr(self, field)!r:.60}"
        for name, split in self.splits.items():
            counts = (split.num_clips, split.num_labelled, split.num_positive)
            if not all(map(is_count, counts)):
                return f"split {name!r} counts {counts!r:.60}"
            for shard in split.shards:
                fits = isinstance(shard.file, str) and isinstance(shard.sha256, str)
                fits = fits and is_count(shard.num_clips) and is_count(shard.bytes)
                lists = (shard.video_clips, shard.clip_samples)
                fits = fits and all(isinstance(counts, list) and all(map(is_count, counts)) for counts in lists)
                if not fits or len(shard.clip_samples) != (shard.num_clips if self.max_samples else 0):
                    return f"a shard of split {name!r} is {dataclasses.astuple(shard)!r:.120}"
        return None

    def clip_samples(self, split: str) -> Int64[np.ndarray, " n"]:
        """Returns the number of audio samples of each clip of a split, in the order of the records."""
        counts = self.splits[split]
        if not self.max_samples:
            return np.full(counts.num_clips, self.num_samples, np.int64)
        return np.array([samples for shard in counts.shards for samples in shard.clip_samples], np.int64)

    def describe_splits(self) -> str:
        """Returns how many clips each split has, as "train 30, validation 0, test 0"."""
        return ", ".join(f"{name} {split.num_clips}" for name, split in self.splits.items())

    def shard_paths(self, folder: str | os.PathLike, split: str) -> list[str]:
        """Returns the paths of a split's shards, in order.

        Raises:
          ValueError: The data set has no such split, the split has no clips, or one of its shards is missing.
        """
        if split not in self.splits:
            raise ValueError(f"{folder} has no split {split!r}, only {sorted(self.splits)}")
        paths = [pathlib.Path(folder) / shard.file for shard in self.splits[split].shards]
        if not paths:
            raise ValueError(f"{folder} has no clips in {split!r} ({self.describe_splits()})")
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}")
        return [str(path) for path in paths]


def unnamed_class(class_id: int) -> str:
    """Returns the name in `ClipsInfo.classes` of a class that no annotation names."""
    return f"class {class_id}"


def check(clip: Clip, info: ClipsInfo) -> None:
    """Checks that a clip is what `clips.json` promises.

    Raises:
      ValueError: The number of frames or of samples is another one, or the frames are larger than the canvas.
    """
    num_frames = info.num_intervals * info.num_candidates
    if len(clip.frames) != num_frames:
        raise ValueError(
            f"clip {clip.clip_id} holds {len(clip.frames)} frames, {CLIPS_FILE} says {info.num_intervals} intervals x "
            f"{info.num_candidates} candidates = {num_frames}"
        )
    least, most = (1, info.max_samples) if info.max_samples else (info.num_samples, info.num_samples)
    if not least <= len(clip.audio) <= most:
        said = f"from 1 to {most}" if info.max_samples else most
        raise ValueError(f"clip {clip.clip_id} holds {len(clip.audio)} samples, {CLIPS_FILE} says {said}")
    if clip.frame_height > info.canvas_px[0] or clip.frame_width > info.canvas_px[1]:
        size = (clip.frame_height, clip.frame_width)
        raise ValueError(f"clip {clip.clip_id} has frames of {size} px, larger than the canvas {tuple(info.canvas_px)}")
