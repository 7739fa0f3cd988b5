"""Checkpoints in and out: `python -m mc3_jax.convert {import,export,show} ...`.

    python -m mc3_jax.convert import --video egovlp.pth --text egovlp.pth --audio deit.pth --out weights/start
    python -m mc3_jax.convert export runs/mc3_ego4d --to pth --out mc3.pth
    python -m mc3_jax.convert show anything.pth

Reading a file never executes anything in it; see `mc3_jax.models.checkpoint_files`. Exports have EgoVLP's layout with
action2sound's `audio_model` (`pth`, `safetensors`) or Hugging Face's layout (`hf_text`, `hf_audio`), or are a folder of our
own format. Weights are float32 and are written bit for bit.
"""

import argparse
import dataclasses
import errno
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

import jinja2
import numpy as np
import transformers

import mc3_jax
from mc3_jax import (
    checkpoint,
    config as config_lib,
    terminal,
    tower_tokenizer,
    training_facts,
    validation,
    weights,
    whole_file,
)
from mc3_jax.data import tokenizer as tokenizer_lib
from mc3_jax.models import checkpoint_files, layouts

# The two classifiers of timm's distilled DeiT (ImageNet's 1,000 classes), which AST's module has but never uses.
_UNREAD_HEADS = ("v.head", "v.head_dist")
_NUM_UNREAD_CLASSES = 1000
# Fields of a model's config that change how it is computed or trained, not what its embeddings are.
_NO_SIZES = {"dtype", "remat", "scan_layers", "attention", "dropout", "max_time_mask", "max_mel_mask", "crop_scale",
             "flip_probability", "time_init", "num_classes"}  # fmt: skip
# How `config.json` identifies a folder of each kind: by our `format`, or by Hugging Face's `model_type`.
_KINDS = {"folder": weights.FORMAT, "hf_text": "distilbert", "hf_audio": "audio-spectrogram-transformer"}


def to_torch_layout(flat: weights.Flat) -> dict[str, np.ndarray]:
    """Returns all parameters under the names of EgoVLP's `FrozenInTime` and action2sound's `audio_model`.

    AST's two unused classifiers are included as zeros, since its module requires them in a strict load.

    Args:
      flat: Flat parameters of all three towers.
    """
    out = {}
    for tower, encoder, prefix in (("video", "egovlp", "video_model."), ("text", "hf", "text_model.")):
        for name, value in layouts.to_theirs(_tower(flat, tower), tower, encoder, "head").items():
            out[name if name.startswith(("vid_proj.", "txt_proj.")) else prefix + name] = value
    for name, value in layouts.to_theirs(_tower(flat, "audio"), "audio", "timm", "head").items():
        out[f"audio_model.{name}" if name.startswith("mlp_head.") else f"audio_model.v.{name}"] = value
    width = len(flat["audio/encoder/class_token"])
    for head in _UNREAD_HEADS:
        out[f"audio_model.{head}.weight"] = np.zeros((_NUM_UNREAD_CLASSES, width), np.float32)
        out[f"audio_model.{head}.bias"] = np.zeros(_NUM_UNREAD_CLASSES, np.float32)
    return out


def _tower(flat: weights.Flat, tower: str) -> weights.Flat:
    return {name.removeprefix(f"{tower}/"): value for name, value in flat.items() if name.startswith(f"{tower}/")}


def write_safetensors(flat: weights.Flat, path: pathlib.Path) -> None:
    """Writes `to_torch_layout` as safetensors; the names have no prefix such as "module."."""
    weights.save_tensors(to_torch_layout(flat), path, "pt")


def write_pth(flat: weights.Flat, path: pathlib.Path) -> None:
    """Writes `to_torch_layout` as EgoVLP's trainer saves it: {"state_dict": {"module.<name>": tensor}}.

    Raises:
      ValueError: PyTorch isn't installed.
      OSError: The file can't be written.
    """
    try:
        import torch  # only here: nothing else needs it
    except ImportError as error:
        raise ValueError("--to pth needs PyTorch: `pip install torch`, or use --to safetensors") from error
    tensors = {f"module.{name}": torch.from_numpy(value.copy()) for name, value in to_torch_layout(flat).items()}
    try:
        torch.save({"arch": "FrozenInTime", "state_dict": tensors}, path)
    except RuntimeError as error:  # that is how it tells of a full disk, by positions in its archive
        said = str(error).splitlines()[0]
        raise OSError(errno.EIO, f"can't be written, its disk may be full ({said})", str(path)) from error


def write_hugging_face(flat: weights.Flat, config: config_lib.ModelConfig, tower: str, folder: pathlib.Path) -> None:
    """Writes the encoder of a tower as a folder that `AutoModel.from_pretrained` opens.

    The projection goes into `projection.safetensors` in the same folder, since those classes have none.

    Args:
      flat: Flat parameters of all towers.
      config: Sizes of the model.
      tower: "text" (DistilBertModel) or "audio" (ASTModel).
      folder: Created if missing.
    """
    own = _tower(flat, tower)
    if tower == "text":
        text = config.text
        described = transformers.DistilBertConfig(
            vocab_size=text.vocab_size, max_position_embeddings=text.num_positions, dim=text.width,
            n_layers=text.depth, n_heads=text.num_heads, hidden_dim=text.mlp_width, dropout=text.dropout,
            attention_dropout=text.dropout, architectures=["DistilBertModel"],
        )  # fmt: skip
    else:
        audio = config.audio
        described = transformers.ASTConfig(
            hidden_size=audio.width, num_hidden_layers=audio.depth, num_attention_heads=audio.num_heads,
            intermediate_size=own["encoder/block_0/mlp/hidden/bias"].shape[0], patch_size=audio.patch_px,
            frequency_stride=audio.stride_px, time_stride=audio.stride_px, max_length=audio.num_time_frames,
            num_mel_bins=audio.num_mel, layer_norm_eps=1e-6, qkv_bias=True, architectures=["ASTModel"],
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    described.save_pretrained(folder)
    tensors = layouts.to_theirs(own, tower, "hf")
    with whole_file.writing(folder / weights.WEIGHTS_FILE) as aside:
        weights.save_tensors(tensors, aside, "pt")
    named = layouts.to_theirs(own, tower, "hf", "head")
    heads = {name: value for name, value in named.items() if name not in tensors}
    with whole_file.writing(folder / weights.PROJECTION_FILE) as aside:
        weights.save_tensors(heads, aside, "pt")


def write_own_folder(
    flat: weights.Flat, config: config_lib.ModelConfig, folder: pathlib.Path, tokenizer: str, origin: list[str],
    learned: Sequence[str] = (), untrained: Sequence[str] = (), num_samples: int = 0,
) -> None:  # fmt: skip
    """Writes a folder of our own format, with the tokenizer's files and a model card.

    Args:
      flat: Flat parameters of all towers.
      config: Sizes of the model.
      folder: Created if missing.
      tokenizer: Folder whose tokenizer is copied; "" copies none.
      origin: Lines that say where the weights come from.
      learned: Digests of further tokenizers that the text tower may be used with, beside the one that is copied.
      untrained: Towers that were never trained.
      num_samples: Samples at 16 kHz that every sound had in training; 0 if that is not known.

    Raises:
      ValueError: The tokenizer's folder holds none, or none is to be copied and `folder` already holds one.
    """
    if not tokenizer and tokenizer_lib.holds_tokenizer(folder):
        raise ValueError(
            f"--out {folder} holds a tokenizer, which would be mistaken for this model's; this model has none: choose "
            "another folder, or name a tokenizer by --tokenizer FOLDER"
        )
    digests = list(learned)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer_lib.copy_tokenizer(tokenizer, folder, beside_model=True)
        digests += [tokenizer_lib.tokenizer_digest(place) for place in (tokenizer, folder)]
    facts = {
        "mc3_jax_version": mc3_jax.__version__, "origin": origin, tower_tokenizer.DIGESTS: list(dict.fromkeys(digests)),
        training_facts.UNTRAINED: list(untrained), training_facts.NUM_SAMPLES: num_samples,
    }  # fmt: skip
    weights.write_folder(str(folder), flat, config, facts)
    sizes = {tower: sum(value.size for value in _tower(flat, tower).values()) for tower in config_lib.MODALITIES}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mc3_jax", "."), keep_trailing_newline=True)
    trained = [tower for tower in config_lib.MODALITIES if tower not in untrained]
    card = environment.get_template("model_card.md.j2").render(
        name=folder.name, sizes=sizes, config=config, tokenizer=bool(tokenizer), version=mc3_jax.__version__, origin=origin,
        trained=trained, example=_example(trained),
        warning=training_facts.describe_untrained(untrained) if untrained else "",
    )  # fmt: skip
    with whole_file.writing(folder / "README.md") as aside:
        aside.write_text(card)


def _example(trained: Sequence[str]) -> str:
    """Returns a line of code that compares embeddings of two of the trained towers, or makes those of the only one."""
    calls = {
        "audio": "model.embed_audio(waveform, 16_000)", "video": "model.embed_video(frames)",
        "text": 'model.embed_text(["#C C cuts the onion"])',
    }  # fmt: skip
    shown = [calls[tower] for tower in trained if tower != "video" or len(trained) < 3]
    return " @ ".join(shown) + (".T" if len(shown) > 1 and "text" in trained else "")


def _read_config(path: str) -> config_lib.ModelConfig:
    """Returns the model's sizes from a config file; "" returns the paper's."""
    if not path:
        return config_lib.ModelConfig()
    if not pathlib.Path(path).is_file() or not path.endswith(".py"):
        raise ValueError(f"no config file {path}: name a .py file such as configs/mc3_ego4d.py")
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a config file is code: any error in it is the user's to mend
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    validation.validate(config)
    return config.model


def _check_out(out: pathlib.Path, kind: str) -> None:
    """Refuses an output path where a run or weights of another kind would be overwritten, since file names are the same.

    Args:
      out: Path of the output.
      kind: Kind of the output, as for `--to`.

    Raises:
      ValueError: It is a run's workdir, a folder of another kind, or a file where a folder is to be written or the reverse.
    """
    if weights.is_run(str(out)):
        raise ValueError(f"--out {out} is the workdir of a run: choose another folder")
    is_file = kind in ("pth", "safetensors")
    if out.is_dir() if is_file else out.is_file():
        there, wanted = ("folder", "file") if is_file else ("file", "folder")
        raise ValueError(f"--out {out} is a {there}, but --to {kind} writes a {wanted}: choose another path")
    if not is_file and (out / weights.CONFIG_FILE).is_file():
        there = checkpoint_files.read_config(out)
        found = there.get("format") if "format" in there else there.get("model_type")
        if found != _KINDS[kind]:
            told = f"of {found!r}" if found else "of another kind"
            raise ValueError(
                f"--out {out} holds a model {told}, whose {weights.CONFIG_FILE} and weights those of {_KINDS[kind]!r} would "
                "overwrite: choose another folder"
            )


def import_weights(args: argparse.Namespace) -> None:
    """Writes a folder of our own format from checkpoints.

    The tokenizer is the one that came with the text tower, or the one named on the command line.

    Raises:
      ValueError: No checkpoint is named, or one can't be used (see `weights.read_towers`); the tokenizer is missing or is not
        the text tower's; or the output path is a run or holds something else.
    """
    _check_out(pathlib.Path(args.out), "folder")
    paths = {tower: getattr(args, tower) or args.checkpoint for tower in config_lib.MODALITIES}
    paths = {tower: path for tower, path in paths.items() if path}
    if not paths:
        raise ValueError("name what to import: --checkpoint FILE for all towers, or --audio, --video, --text")
    config, whose = _read_sizes(args.config, list(paths.values()))
    text = paths.get("text", "")
    tokenizer = _find_tokenizer(text, args.tokenizer, config)
    try:
        flat, notes = weights.read_towers(paths, config, temporal=args.temporal)
    except checkpoint.MisfitError as error:
        raise ValueError(f"{error}; the sizes are {whose}") from error
    notes += [f"{tower} is initialised at random (seed {args.seed})" for tower in config_lib.MODALITIES if tower not in paths]
    flat = weights.complete(flat, config, args.seed)
    learned = tower_tokenizer.learned(text) if text else []
    known = {tower: training_facts.read_untrained(path) for tower, path in paths.items()}
    untrained = [tower for tower in config_lib.MODALITIES if tower not in paths or tower in known[tower]]
    num_samples = _num_samples(paths["audio"], config) if "audio" in paths else 0
    write_own_folder(flat, config, pathlib.Path(args.out), tokenizer, notes, learned, untrained, num_samples)
    print("\n".join(notes))
    print(f"{sum(value.size for value in flat.values()):,} parameters -> {args.out}")


def _read_sizes(named: str, sources: list[str]) -> tuple[config_lib.ModelConfig, str]:
    """Returns the sizes of the model to import, and words that say where these are from.

    Args:
      named: Config file of the command line. "" takes the sizes of the source if that is a single run or folder of our own
        format, and otherwise the paper's.
      sources: Files and folders that the towers come from.

    Raises:
      ValueError: The config file, or that of the source, can't be read.
    """
    if named:
        return _read_config(named), f"those of --config {named}"
    is_one = len({os.path.realpath(source) for source in sources}) == 1
    if is_one and (weights.is_run(sources[0]) or weights.is_own_folder(sources[0])):
        # Only towers are imported, no classifier.
        return dataclasses.replace(weights.read_model_config(sources[0]), num_classes=0), f"those of {sources[0]}"
    return _read_config(""), "the paper's; name others by --config FILE"


def _num_samples(source: str, config: config_lib.ModelConfig) -> int:
    """Returns the number of samples that sounds had in an audio tower's training; 0 if unknown, or if its window changes."""
    num_samples = training_facts.read_num_samples(source)
    frames = weights.read_model_config(source).audio.num_time_frames if num_samples else 0
    return num_samples if frames == config.audio.num_time_frames else 0


def _find_tokenizer(source: str, named: str | None, config: config_lib.ModelConfig) -> str:
    """Returns the folder of the tokenizer to include with a text tower, or ""; prints which one it is, or why there is none.

    If the tower was trained with a tokenizer that can't be found, that is an error, not a remark: without it the copy can't
    embed text, and whoever makes the copy may be the last who can still find it.

    Args:
      source: File or folder that the text tower comes from; "" if the tower starts at random.
      named: Tokenizer folder of the command line; "" includes none, None takes the one that came with the source.
      config: Sizes of the model.

    Raises:
      ValueError: The tokenizer can't be found or read, or is not the one that the tower was trained with.
    """
    found = tower_tokenizer.find(source, named or "") if source and named != "" else named
    if found:
        try:
            tokenizer_lib.load_tokenizer(found, config.text.num_tokens, config.text.vocab_size)
        except ValueError as error:
            if named:
                raise
            raise ValueError(f"{error}; or give --tokenizer '' to include none") from error
        print(f"the tokenizer in {found} is included")
        return found
    reason = tower_tokenizer.why_none(source) if source else ""
    if named is None and reason:
        raise ValueError(f"{reason}: name it by --tokenizer FOLDER, or give --tokenizer '' to include none")
    if named == "" and source and (left := tower_tokenizer.own(source)):
        reason = f"the one in {left} is skipped"
    reason = reason or (f"{source} has none" if source else "there is no text tower to take it from")
    print(f"no tokenizer is included: {reason}" + ("; name one by --tokenizer FOLDER" if named is None else ""))
    return ""


def export_weights(args: argparse.Namespace) -> None:
    """Writes a run or a folder of our own format in another layout, the text tower with its tokenizer.

    Raises:
      ValueError: The source is neither a run nor such a folder; `--step` is given without a run, or `--tokenizer` with a
        layout that includes none; the tokenizer is missing or is not the text tower's; or the output path is a run or holds
        something else.
    """
    _check_out(pathlib.Path(args.out), args.to)
    config = weights.read_model_config(args.source)
    if args.tokenizer is not None and args.to not in ("folder", "hf_text"):
        raise ValueError(f"--tokenizer {args.tokenizer}: --to {args.to} includes no tokenizer, drop the option")
    tokenizer = _find_tokenizer(args.source, args.tokenizer, config) if args.to in ("folder", "hf_text") else ""
    if args.step and not weights.is_run(args.source):
        raise ValueError(f"--step {args.step}: {args.source} is not a run, drop the option")
    origin = pathlib.Path(args.source).name
    if weights.is_run(args.source):
        step, flat = weights.read_run(args.source, args.step)
        origin += f", step {step}"
    else:
        flat, _ = weights.read_checkpoint(args.source, config)
    if config.num_classes:
        print(f"the classifier of {config.num_classes} classes is not exported, only the towers are")
        flat = {name: value for name, value in flat.items() if not name.startswith(f"{config_lib.CLASSIFIER}/")}
        config = dataclasses.replace(config, num_classes=0)
    written = (args.to.removeprefix("hf_"),) if args.to.startswith("hf_") else config_lib.MODALITIES
    untrained = [tower for tower in training_facts.read_untrained(args.source) if tower in written]
    if untrained:
        print(f"warning: {args.source}: {training_facts.describe_untrained(untrained)}", file=sys.stderr)
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.to in ("pth", "safetensors"):
        with whole_file.writing(out) as aside:
            (write_pth if args.to == "pth" else write_safetensors)(flat, aside)
        if sizes := _sizes_as_options(config):
            print(f"{out} doesn't hold the model's sizes: evaluate it with {sizes}, or export --to folder, which holds them")
    elif args.to == "folder":
        learned, num_samples = tower_tokenizer.learned(args.source), training_facts.read_num_samples(args.source)
        write_own_folder(flat, config, out, tokenizer, [origin], learned, untrained, num_samples)
    else:
        write_hugging_face(flat, config, args.to.removeprefix("hf_"), out)
        if tokenizer:
            tokenizer_lib.copy_tokenizer(tokenizer, out, beside_model=True)
    print(f"{args.source} -> {args.out}")


def _sizes_as_options(config: config_lib.ModelConfig) -> str:
    """Returns the options by which `mc3_jax.evaluate` takes a model for one of these sizes; "" if it has the paper's."""
    plain, options = config_lib.ModelConfig(), []
    for field in dataclasses.fields(config):
        own, other = getattr(config, field.name), getattr(plain, field.name)
        parts = dataclasses.fields(own) if dataclasses.is_dataclass(own) else ()
        pairs = {f"{field.name}.{part.name}": (getattr(own, part.name), getattr(other, part.name)) for part in parts}
        for name, (here, there) in (pairs or {field.name: (own, other)}).items():
            if here != there and name.split(".")[-1] not in _NO_SIZES:
                options.append(f"--config.model.{name}={here}")
    return " ".join(options)


def show(args: argparse.Namespace) -> None:
    """Prints the layout, the towers and the tensors of a checkpoint.

    Raises:
      ValueError: It can't be read, or its layout is unknown.
    """
    if weights.is_run(args.source) or weights.is_own_folder(args.source):
        print(f"{args.source}: mc3_jax, {dataclasses.asdict(weights.read_model_config(args.source))}")
        return
    found = weights.read_sources(args.source)
    for tower, source in found.items():
        num = sum(value.size for value in source.tensors.values())
        has_head = source.head or any(name.startswith("projection/") for name in source.tensors)
        head = "with" if has_head else "without"
        print(f"{tower}: {source.encoder} layout {head} projection, {len(source.tensors)} tensors, {num:,} values")
        for name, value in source.tensors.items() if args.names else ():
            print(f"  {name} {list(value.shape)} {value.dtype}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mc3_jax.convert", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="other people's checkpoints -> an mc3_jax folder")
    take.add_argument("--checkpoint", default="", help="file or folder that holds several towers")
    for tower in config_lib.MODALITIES:
        take.add_argument(f"--{tower}", default="", help=f"file or folder that the {tower} tower comes from")
    take.add_argument(
        "--config", default="", help="file in configs/ with the model's sizes; default: those of a run or mc3_jax folder "
        "if it is the only source, otherwise the paper's",
    )  # fmt: skip
    take.add_argument("--tokenizer", help="folder of the tokenizer to include; default: the text tower's; '' for none")
    take.add_argument(
        "--temporal", choices=("zeros", "linear"), default="zeros", help="how missing temporal positions are filled"
    )
    take.add_argument("--seed", type=int, default=0, help="seed of the random weights that no file provides")
    take.add_argument("--out", required=True, help="folder to write")
    take.set_defaults(run=import_weights)
    give = commands.add_parser("export", help="a run or an mc3_jax folder -> PyTorch, Hugging Face or an mc3_jax folder")
    give.add_argument("source", help="mc3_jax folder or workdir of a run")
    give.add_argument("--to", required=True, choices=("pth", "safetensors", "hf_text", "hf_audio", "folder"))
    give.add_argument("--step", type=int, default=0, help="step of a run's checkpoint; default: the newest")
    give.add_argument("--tokenizer", help="folder of the source's tokenizer, if it has moved; '' for none")
    give.add_argument("--out", required=True, help="file or folder to write")
    give.set_defaults(run=export_weights)
    look = commands.add_parser("show", help="what a checkpoint holds")
    look.add_argument("source", help="file or folder to look at")
    look.add_argument("--names", action="store_true", help="also print every tensor's name, shape and dtype")
    look.set_defaults(run=show)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs a command; for bad input, prints one line and exits with status 2, after Ctrl-C with 130."""
    args = _parse(argv)
    with terminal.errors_in_one_line(), terminal.interrupts():
        args.run(args)


if __name__ == "__main__":
    main()
