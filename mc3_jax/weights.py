"""Parameters from and to files: other people's checkpoints, runs, and folders of our own format.

A folder of our own format holds `config.json` (the model's sizes), `model.safetensors` (float32, names such as
"video/encoder/block_0/mlp/out/kernel"), the tokenizer's files and a model card. Other people's files are read by
`mc3_jax.models.checkpoint_files`, which executes nothing in them. Their parameters are renamed by `mc3_jax.models.layouts`
and fitted to the model's sizes by `mc3_jax.models.fitting`.

Parameters are flat here: {"video/encoder/norm/scale": float32 array}.
"""

import dataclasses
import errno
import json
import os
import pathlib
import re
from collections.abc import Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy

from mc3_jax import checkpoint, config as config_lib, mesh as mesh_lib, model as model_lib, validation, whole_file
from mc3_jax.models import checkpoint_files, fitting, layouts

FORMAT = "mc3_jax"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
PROJECTION_FILE = "projection.safetensors"  # in the Hugging Face folders we write, whose classes have no projection
Flat = dict[str, np.ndarray]
Shapes = dict[str, jax.ShapeDtypeStruct]
# Parts of a video tower that an image model lacks.
_NOT_IN_IMAGES = ("encoder/temporal_embedding", "/norm_time/", "/time_attention/")


def param_shapes(config: config_lib.ModelConfig) -> Shapes:
    """Returns name → shape and dtype of a model's parameters, without computing any."""
    return checkpoint.flatten(jax.eval_shape(lambda: model_lib.init_params(model_lib.make_model(config), config, 0)))


def is_own_folder(path: str) -> bool:
    """Returns whether `path` is a folder that `write_folder` wrote."""
    folder = pathlib.Path(path)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return False
    return checkpoint_files.read_config(folder).get("format") == FORMAT


def is_run(path: str) -> bool:
    """Returns whether `path` is the workdir of a run that has a checkpoint."""
    return bool(checkpoint.steps_of(path))


def _check_no_part_of_a_run(path: str) -> None:
    """Checks that what is no run is neither one without weights so far nor a folder of its checkpoints.

    Raises:
      ValueError: It is; says what to name in its place.
    """
    folder = pathlib.Path(path).absolute()
    if not folder.is_dir():
        return
    if (folder / CONFIG_FILE).is_file() and "phases" in checkpoint_files.read_config(folder):
        raise ValueError(f"{path} is the workdir of a run that has saved no checkpoint so far: train it, or name another")
    for step in (folder, folder.parent):  # the folder of all checkpoints, or of one
        if step == checkpoint.checkpoint_dir(str(step.parent)).absolute() and is_run(str(step.parent)):
            raise ValueError(
                f"{path} lies in the workdir of a run: name {step.parent}; an earlier step of it is written by `python -m "
                f"mc3_jax.convert export {step.parent} --step STEP --to folder --out FOLDER`"
            )


def read_model_config(path: str) -> config_lib.ModelConfig:
    """Returns the sizes of the model in a folder of our own format or in a run.

    Raises:
      ValueError: `path` is neither, or its `config.json` is damaged, of another version, or has impossible sizes.
    """
    if is_run(path):
        model = read_run_config(path).model
    elif is_own_folder(path):
        values = checkpoint_files.read_config(pathlib.Path(path)).get("model")
        model = config_lib.from_dict(config_lib.ModelConfig, values, f"{path}/{CONFIG_FILE}: model")
    else:
        _check_no_part_of_a_run(path)
        raise ValueError(f"{path} is neither a folder of `python -m mc3_jax.convert` nor the workdir of a run")
    try:
        validation.validate_model(model)
    except ValueError as error:
        raise ValueError(f"{path}/{CONFIG_FILE}: {error}") from error
    return model


def read_run_config(workdir: str) -> config_lib.Config:
    """Returns the config that a run was started with.

    Raises:
      ValueError: The config is missing, damaged or of another version.
    """
    values = checkpoint_files.read_config(pathlib.Path(workdir))
    return config_lib.from_dict(config_lib.Config, values, f"{workdir}/{CONFIG_FILE}")


def read_run(workdir: str, step: int = 0) -> tuple[int, Flat]:
    """Returns the step of a run's checkpoint and its parameters, on the host.

    Args:
      workdir: Workdir of the run.
      step: Step of the checkpoint; 0 takes the newest.

    Raises:
      ValueError: There is no such checkpoint, or it is damaged or of another model.
    """
    shapes = checkpoint.unflatten(param_shapes(read_model_config(workdir)))
    abstract = mesh_lib.abstract_state(mesh_lib.make_mesh(), shapes)
    if step:
        params = checkpoint.restore_params(workdir, step, abstract)
    else:
        step, params = checkpoint.restore_newest_params(workdir, abstract)
    return step, {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(params).items()}


def read_sources(path: str) -> dict[str, layouts.Source]:
    """Returns tower → its tensors, from a run, a folder of our own format or somebody else's checkpoint.

    Raises:
      ValueError: The path can't be read, or its layout is unknown.
    """
    if is_run(path):
        return layouts.recognize(read_run(path)[1], path)
    _check_no_part_of_a_run(path)
    tensors = checkpoint_files.read_tensors(pathlib.Path(path))
    beside = pathlib.Path(path) / PROJECTION_FILE
    if beside.is_file():
        tensors |= checkpoint_files.read_tensors(beside)
    return layouts.recognize(tensors, path)


def _check_heads_and_activation(path: str, tower: str, config: config_lib.ModelConfig) -> None:
    """Checks what the shapes of the weights can't show: the number of attention heads and the activation function.

    Raises:
      MisfitError: The `config.json` beside the weights has another number of heads.
      ValueError: It has another activation than exact GELU, the only one implemented here.
    """
    ours = getattr(config, tower).num_heads
    if is_run(path) or is_own_folder(path):
        theirs = getattr(read_model_config(path), tower).num_heads
    elif pathlib.Path(path).is_dir():
        described = checkpoint_files.read_config(path)
        theirs = described.get("num_attention_heads", described.get("n_heads", ours))
        activation = described.get("hidden_act", described.get("activation", "gelu"))
        if activation not in ("gelu", "gelu_python"):
            raise ValueError(
                f"{path} has the activation {activation!r}, but the {tower} tower here has exact GELU ('gelu'): use weights "
                "that were trained with it"
            )
    else:
        return
    if theirs != ours:
        raise checkpoint.MisfitError(
            f"{path} has model.{tower}.num_heads = {theirs}, but the config {ours}: set it to {theirs}"
        )


def read_towers(
    paths: Mapping[str, str], config: config_lib.ModelConfig, *, temporal: str = "zeros", drop_heads: bool = True
) -> tuple[Flat, list[str]]:
    """Returns the parameters of towers that start from files, and for each tower a line on how they were fitted.

    Parameters that a file may lack are missing from the result, for `complete` to fill in: the projection of a tower, if the
    file has none or one to another `embed_dim`, and time attention, if a video tower starts from an image model.

    Args:
      paths: Tower → file or folder: a run's workdir, a folder of our own format, or a checkpoint of EgoVLP, action2sound,
        AST, DeiT, ViT or DistilBERT as `.pth`, safetensors or Hugging Face folder. Several towers may share one.
      config: Sizes of the model.
      temporal: See `config.InitConfig`.
      drop_heads: Whether to drop a projection to another dimension, such as a classifier; otherwise it is an error.

    Raises:
      MisfitError: A file has other names or shapes, which the message lists with + and -, or another number of heads.
      ValueError: A file is damaged, of unknown layout, lacks a tower, has values that are not finite, or has another
        activation.
    """
    shapes = param_shapes(config)
    flat, notes = {}, []
    for path in dict.fromkeys(paths.values()):
        found = read_sources(path)
        for tower in (tower for tower, own in paths.items() if own == path):
            _check_heads_and_activation(path, tower, config)
            params, done = _take_tower(found, tower, config, shapes, temporal, drop_heads, path)
            flat |= params
            notes.append(f"{tower} from {path}" + (f": {'; '.join(done)}" if done else ""))
    return flat, notes


def _take_tower(
    found: Mapping[str, layouts.Source], tower: str, config: config_lib.ModelConfig, shapes: Shapes, temporal: str,
    drop_heads: bool, path: str,
) -> tuple[Flat, list[str]]:  # fmt: skip
    """Returns the parameters of one tower of a file, fitted to the model's sizes, and notes on what was changed."""
    source = found.get(tower) or found.get("image")
    if source is None:
        raise ValueError(
            f"{path} holds {' and '.join(found)}, no {tower} tower: combine towers of several files by "
            "`python -m mc3_jax.convert import --audio FILE --video FILE --text FILE --out FOLDER`"
        )
    wanted = {name.removeprefix(f"{tower}/"): shape for name, shape in shapes.items() if name.startswith(f"{tower}/")}
    params, where = layouts.to_ours(source, tower, path), f"{path}, {tower} tower,"
    tables = [name for name in wanted if name.endswith("_embedding") and source.encoder == layouts.OURS]
    if any(params.get(name, np.zeros(())).ndim != 2 for name in tables):
        checkpoint.check_shapes(params, wanted, where)  # not of our layout, despite its names
    image, notes = source.tower == "image", []
    if tower == "audio":
        params, notes = _fit_audio(params, config, image, path)
    elif tower == "video":
        positions = (wanted[f"encoder/{name}_embedding"].shape[0] for name in ("position", "temporal"))
        params, notes = _fit_video(params, *positions, temporal, path)
    params, dropped = _drop_other_head(params, config.embed_dim) if drop_heads else (params, [])
    fresh = _starts_afresh([name for name in wanted if name not in params], params, image and tower == "video")
    checkpoint.check_shapes(params, {name: shape for name, shape in wanted.items() if name not in fresh}, where)
    if broken := sorted(name for name, value in params.items() if not np.isfinite(value).all()):
        raise ValueError(
            f"{where} has values that are NaN or infinite in {broken[0]} ({len(broken)} such): training has "
            "diverged or the file is damaged, use another file"
        )
    notes += dropped + ([f"not in the file, newly initialised: {', '.join(sorted(set(fresh.values())))}"] if fresh else [])
    return {f"{tower}/{name}": np.asarray(value, np.float32) for name, value in params.items()}, notes


def _starts_afresh(missing: list[str], params: Flat, timeless: bool) -> dict[str, str]:
    """Returns those missing parameters that a file need not hold → the part of the tower that each belongs to.

    A head may be missing as a whole, but not in part. Time attention may be missing if the file holds an image model.
    """
    headless = not any(name.startswith("projection/") for name in params)
    kinds = {name: name.split("/")[0] for name in missing if headless and name.startswith(("norm/", "projection/"))}
    return kinds | {
        name: "time attention" for name in missing if timeless and any(part in name for part in _NOT_IN_IMAGES)
    }


def _fit_audio(params: Flat, config: config_lib.ModelConfig, image: bool, path: str) -> tuple[Flat, list[str]]:
    """Returns AST's encoder, fitted from an AST of another length or from an image model, and notes on what was changed."""
    kernel, token = "encoder/patch_embedding/kernel", "encoder/distillation_token"
    position, notes = params["encoder/position_embedding"], []
    if image:
        params = params | {kernel: fitting.sum_over_rgb(params[kernel], len(params[kernel]) // 3)}
        notes.append("patch kernel summed over RGB")
        if token not in params:
            # A ViT without distillation: the second token starts as a copy of the first.
            params[token] = params["encoder/class_token"].copy()
            position = np.concatenate([position[:1], position])
            notes.append("distillation token copied from the class token")
    grid = model_lib.make_model(config).audio_tower.grid
    # The length of the file's grid follows from its number of patches along mel.
    rows = None if image else _num_mel_patches(path, config)
    position, note = fitting.fit_audio_positions(position, grid, rows, path)
    return params | {"encoder/position_embedding": position}, notes + ([note] if note else [])


def _num_mel_patches(path: str, config: config_lib.ModelConfig) -> int:
    """Returns the number of patches along mel of an AST, as its run or folder records it; for a file, that of the model.

    Raises:
      ValueError: The `config.json` of a Hugging Face folder has impossible sizes.
    """
    if is_run(path) or is_own_folder(path):
        config = read_model_config(path)
    elif pathlib.Path(path).is_dir():
        described, ours = checkpoint_files.read_config(path), config.audio
        sizes = {"num_mel": "num_mel_bins", "patch_px": "patch_size", "stride_px": "frequency_stride"}
        theirs = {name: described.get(key, getattr(ours, name)) for name, key in sizes.items()}
        if odd := [name for name, value in theirs.items() if type(value) is not int or value < 1]:
            raise ValueError(f"{path} has {sizes[odd[0]]} = {theirs[odd[0]]!r}: it must be a whole number above 0")
        config = dataclasses.replace(config, audio=dataclasses.replace(ours, **theirs))
    return model_lib.make_model(config).audio_tower.grid[0]


def _fit_video(
    params: Flat, num_positions: int, num_times: int, temporal: str, path: str
) -> tuple[Flat, list[str]]:
    """Returns a video encoder fitted to the model's image grid and temporal positions, and notes on what was changed."""
    place, time = "encoder/position_embedding", "encoder/temporal_embedding"
    position, note = fitting.fit_image_positions(params[place], num_positions - 1, path)
    params, notes = params | {place: position}, [note]
    if time in params:
        table, note = fitting.fit_temporal(params[time], num_times, temporal)
        params, notes = params | {time: table}, [*notes, note]
    return params, [note for note in notes if note]


def _drop_other_head(params: Flat, embed_dim: int) -> tuple[Flat, list[str]]:
    """Returns the parameters without a projection to another dimension (as of a classifier), and a note if there was one."""
    bias = params.get("projection/bias")
    if bias is None or len(bias) == embed_dim:
        return params, []
    encoder = {name: value for name, value in params.items() if name.startswith("encoder/")}
    return encoder, [f"its head of {len(bias)} outputs is skipped, since embed_dim is {embed_dim}"]


def read_checkpoint(
    path: str, config: config_lib.ModelConfig, *, temporal: str = "zeros"
) -> tuple[Flat, list[str]]:
    """Returns all parameters of the model's towers from one file or folder, and notes on how they were fitted.

    No parameter is initialised at random, and no classifier is read.

    Args:
      path: As for `read_towers`.
      config: Sizes of the model.
      temporal: See `config.InitConfig`.

    Raises:
      ValueError: As `read_towers`, or a tower or projection is missing.
    """
    paths, config = dict.fromkeys(config_lib.MODALITIES, path), dataclasses.replace(config, num_classes=0)
    flat, notes = read_towers(paths, config, temporal=temporal, drop_heads=False)
    checkpoint.check_shapes(flat, param_shapes(config), path)
    return flat, notes


def read_initial(config: config_lib.Config) -> tuple[Flat, list[str]]:
    """Returns parameters of the towers that `config.init` starts from files, and notes on how they were fitted.

    Raises:
      ValueError: As `read_towers`.
    """
    starts = {tower: getattr(config.init, tower) for tower in config_lib.MODALITIES if getattr(config.init, tower)}
    return read_towers(starts, config.model, temporal=config.init.temporal) if starts else ({}, [])


def complete(flat: Flat, config: config_lib.ModelConfig, seed: int) -> Flat:
    """Returns all parameters: those given, and the others initialised from the seed as by `init_params`."""
    missing = [name for name in param_shapes(config) if name not in flat]
    if not missing:
        return flat
    model = model_lib.make_model(config)

    @jax.jit
    def draw():
        drawn = checkpoint.flatten(model_lib.init_params(model, config, seed))
        return {name: drawn[name] for name in missing}  # XLA computes only what is returned

    with model_lib.fast_draws():
        return flat | jax.device_get(draw())


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path, kind: str) -> None:
    """Writes a safetensors file whose metadata say "format": `kind`.

    Raises:
      OSError: It can't be written.
    """
    try:
        safetensors.numpy.save_file(dict(tensors), path, metadata={"format": kind})
    except safetensors.SafetensorError as error:  # is no OSError, whatever the system said
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def write_folder(folder: str, flat: Flat, config: config_lib.ModelConfig, facts: dict | None = None) -> None:
    """Writes `model.safetensors` and then `config.json`, each atomically: a folder with a config has complete weights.

    Args:
      folder: Created if missing.
      flat: All parameters of the model.
      config: Sizes of the model.
      facts: Further entries of `config.json`, plain values.
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).unlink(missing_ok=True)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}
    with whole_file.writing(path / WEIGHTS_FILE) as aside:
        save_tensors(tensors, aside, FORMAT)
    content = {"format": FORMAT, "model": dataclasses.asdict(config), **(facts or {})}
    with whole_file.writing(path / CONFIG_FILE) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
