"""Reads tensors from PyTorch files, safetensors files and Hugging Face folders. PyTorch is not needed.

The kind of a file is recognised by its content. The pickle in a PyTorch file is interpreted by `torch_pickles`, which runs
no code of it. Only the raw values of the tensors that are returned are read, so the optimizer's state in a training
checkpoint costs nothing.

Formats: `torch/serialization.py` of PyTorch (BSD-3-Clause), which writes a zip archive since version 1.6, and a plain stream
before that or with `_use_new_zipfile_serialization=False`; safetensors, read by its own library; the folders that
`save_pretrained` of transformers (Apache-2.0) writes.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import struct
import sys
import zipfile

import numpy as np
import safetensors

from mc3_jax.models import torch_pickles
from mc3_jax.models.torch_pickles import RefusedError

Tensors = dict[str, np.ndarray]

CONFIG_FILE = "config.json"
# In order of preference; an index file names the shards.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Keys under which training checkpoints keep the weights.
_NESTED = ("state_dict", "model_state_dict", "model")
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# The dtypes that numpy can hold; bfloat16 is known to it through ml_dtypes, which torch_pickles imports.
_SAFETENSORS_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_RATIO = 20  # Compressed weights shrink by a tenth; an archive that unpacks to more than this is a bomb.
_MAX_NAME = 1000  # Names grow with every level of dictionaries.
_CHUNK_BYTES = 1 << 24
_SLACK_BYTES = 1 << 20
_ANEW = "download or copy it again"
_SOURCES = "a folder in Hugging Face's layout or of `mc3_jax.convert`, or the workdir of a run"


def read_tensors(path: pathlib.Path | str) -> Tensors:
    """Returns name → array for every tensor of a weight file or folder, under its name there.

    In a training checkpoint these are the tensors under the first of the keys `state_dict`, `model_state_dict` and `model`
    that holds any, else all tensors. Names in nested dictionaries are joined with "."; values that are not tensors are
    skipped. Arrays are contiguous and in native byte order; tied tensors may share memory. No code in the file is run.

    Args:
      path: A file of `torch.save` (any suffix), a safetensors file, or a folder with `config.json` and `model.safetensors` or
        `pytorch_model.bin`, whole or in shards.

    Raises:
      ValueError: The file is missing, of another kind or damaged, holds no tensors or some that numpy can't hold, or its
        pickle would call something that no file of weights needs to call.
    """
    path = pathlib.Path(path)
    return _read_folder(path) if path.is_dir() else _read_file(path)


def read_config(folder: pathlib.Path | str) -> dict:
    """Returns the object in a folder's `config.json`.

    Args:
      folder: Folder in Hugging Face's layout or in ours.

    Raises:
      ValueError: The file can't be read, is no JSON or holds no JSON object.
    """
    return _read_json(pathlib.Path(folder) / CONFIG_FILE)


def _read_json(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give {_SOURCES}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({_one_line(error)}): {_ANEW}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: {_ANEW}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_folder(folder: pathlib.Path) -> Tensors:
    """Returns the tensors of a folder in Hugging Face's layout."""
    read_config(folder)
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return _read_shards(folder / name) if name.endswith(".json") else _read_file(folder / name)
    found = ", ".join(repr(entry.name) for entry in sorted(folder.iterdir())[:5])
    raise ValueError(f"{folder} holds none of {', '.join(_FOLDER_FILES)}, only {found}: download one of them as well")


def _read_shards(index: pathlib.Path) -> Tensors:
    """Returns the tensors of the shards that an index file names; they must lie in the same folder."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise ValueError(f"{index} has no weight_map of names to files: {_ANEW}")
    tensors = {}
    for shard in dict.fromkeys(names.values()):
        # A name that contains a path could lead anywhere on this machine.
        if shard in ("", ".", "..") or any(character in shard for character in "/\\:\0"):
            raise ValueError(f"{index} names the file {shard[:80]!r}: only files beside it are read")
        part = _read_file(index.parent / shard)
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"{index}: {min(twice)[:120]!r} is in {shard!r} and in another shard: {_ANEW}")
        tensors |= part
    if missing := names.keys() - tensors.keys():
        name = min(missing)
        raise ValueError(f"{index}: {name[:120]!r} is not in {names[name]!r} ({len(missing)} missing in all): {_ANEW}")
    return tensors


def _read_file(path: pathlib.Path) -> Tensors:
    if not path.is_file():  # a pipe, too, is refused: reading it could wait for ever
        raise ValueError(f"{path} is not a file or folder: give a file of weights, {_SOURCES}")
    try:
        with path.open("rb") as file:
            return _read_by_content(file, path)
    except RefusedError as error:
        raise ValueError(f"{path} {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or _one_line(error)}") from error
    # The bytes are untrusted: they can make a parser raise any exception.
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {_one_line(error)}): {_ANEW}") from error


def _read_by_content(file, path: pathlib.Path) -> Tensors:
    size, head = os.fstat(file.fileno()).st_size, file.read(512)
    file.seek(0)
    # safetensors come first: they begin with the length of their header, whose lowest byte may be 0x80, as that of a pickle
    # is. The ninth byte of the others is no "{": in a pickle it is within a number that would be far too large, and in a zip
    # archive it would be a method of compression that nobody uses.
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes <= _MAX_HEADER_BYTES:
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if head[:1] == b"\x80":
        return _read_stream(file, size)
    raise RefusedError(_describe_kind(head, size))


def _describe_kind(head: bytes, size: int) -> str:
    """Returns what a file of no supported kind seems to be, and how to fix it, for the error message."""
    known = {
        b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository",
        b"\x89HDF": "is an HDF5 file (TensorFlow or Keras): take the model's PyTorch or safetensors weights",
        b"\x93NUMPY": "is a numpy array without names: give a file of torch.save or safetensors",
        b"\x1f\x8b": "is a gzip archive: unpack it first",
        b"{": "is JSON: give the folder that it is in, or the weights beside it",
    }
    for start, what in known.items():
        if head.startswith(start):
            return what
    if not size:
        return f"is empty: {_ANEW}"
    if head.lstrip()[:1] == b"<":
        return "is a web page, perhaps an error message that was saved as the file: download it again"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first; if PyTorch before 0.2 wrote it, load it there and save it again"
    length = int.from_bytes(head[:8], "little")
    what = "seems to be a TFRecord file" if 0 < length <= size - 16 else "is not a known kind of weights file"
    return f"{what} (it begins with {head[:8]!r}): give a file of torch.save or safetensors, or a Hugging Face folder"


def _read_safetensors(path: pathlib.Path) -> Tensors:
    tensors = {}
    with safetensors.safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            _check_printable(name)
            dtype = file.get_slice(name).get_dtype()
            if dtype not in _SAFETENSORS_DTYPES:
                raise RefusedError(
                    f"holds {name[:120]!r} as {dtype}, which is not supported: save it as float32 or bfloat16"
                )
            tensors[name] = file.get_tensor(name)
    if not tensors:
        raise RefusedError("holds no tensors: give a file of weights")
    return tensors


def _read_zip(file, size: int) -> Tensors:
    """Returns the tensors of a file in PyTorch's zip format: a pickle `NAME/data.pkl` and storages `NAME/data/KEY`."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise RefusedError(f"is a truncated zip archive ({_one_line(error)}): {_ANEW}") from error
    entries = {entry.filename: entry for entry in archive.infolist()}
    _check_entries(archive.infolist(), size)
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl" and name.count("/") <= 1]
    if len(pickles) != 1:
        is_numpy = any(name.endswith(".npy") for name in entries)
        kind = "of numpy" if is_numpy else f"with {', '.join(list(entries)[:3])[:120]!r}"
        raise RefusedError(f"is a zip archive {kind}, not of torch.save: unpack it, or give a file of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise RefusedError("is a TorchScript archive: load it with torch.jit.load and save its state_dict")
    order = entries.get(f"{folder}byteorder")
    if order and archive.read(order).decode("ascii") != sys.byteorder:
        raise RefusedError(f"was written in another byte order: save it again on a {sys.byteorder}-endian machine")
    pickle = torch_pickles.Pickle()
    top = pickle.load(io.BytesIO(archive.read(pickles[0])))

    def open_storage(key: str):
        entry = entries.get(f"{folder}data/{key}")
        if entry is None:
            raise RefusedError(f"lacks the storage {key[:40]!r}: {_ANEW}")
        return archive.open(entry), entry.file_size

    return _read_values(_choose(top, pickle.num_opcodes), open_storage, size)


def _check_entries(entries: list, size: int):
    """Raises RefusedError if an archive has two entries of one name, or claims more data than the file can hold."""
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise RefusedError("is a zip archive with two entries of one name: damaged or hostile, not read")
    for entry in entries:
        # For bzip2 and LZMA, Python unpacks all that it has read before it checks the claimed size.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RefusedError(
                f"has an entry {entry.filename[:80]!r} compressed in a way that torch.save never uses: unpack it and zip it "
                "again without compression"
            )
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise RefusedError(f"has an entry {entry.filename[:80]!r} with two sizes: {_ANEW}")
    if sum(entry.compress_size for entry in entries) > size:
        raise RefusedError(f"claims more than its {size} bytes: truncated, {_ANEW}")
    if (total := sum(entry.file_size for entry in entries)) > _MAX_RATIO * size:
        raise RefusedError(f"would unpack from {size} to {total} bytes: no weights compress so well, not read")


def _read_stream(file, size: int) -> Tensors:
    """Returns the tensors of a file in PyTorch's older format: five pickles, then each storage after its number of values."""
    pickle = torch_pickles.Pickle()
    if pickle.load(file) != _LEGACY_MAGIC:
        raise RefusedError("is a pickle, but not of torch.save: save the state_dict with torch.save or safetensors")
    if pickle.load(file) != _LEGACY_PROTOCOL:
        raise RefusedError("is of an unknown version of torch.save: save it again with PyTorch 1.6 or later")
    pickle.load(file)  # the writer's byte order and type sizes; values are always little-endian
    top, keys = pickle.load(file), pickle.load(file)
    places = {}
    for key in keys:
        if type(key) is not str or key not in pickle.storages:
            raise RefusedError(f"holds a storage that its pickle does not name: {_ANEW}")
        (num_values,) = struct.unpack("<q", file.read(8))
        num_bytes = num_values * pickle.storages[key].itemsize
        if not 0 <= num_bytes <= size - file.tell():
            raise RefusedError(f"claims a storage of {num_values} values, more than it holds: truncated, {_ANEW}")
        places[key] = file.tell(), num_bytes
        file.seek(num_bytes, os.SEEK_CUR)

    def open_storage(key: str):
        if key not in places:
            raise RefusedError(f"lacks the storage {key[:40]!r}: {_ANEW}")
        file.seek(places[key][0])
        return contextlib.nullcontext(file), places[key][1]

    return _read_values(_choose(top, pickle.num_opcodes), open_storage, size)


def _choose(top, limit: int) -> dict[str, torch_pickles.Tensor]:
    """Returns flat name → tensor for the object that a file holds.

    Args:
      top: The object that the file's pickle describes.
      limit: Largest number of entries to visit; a file that is not hostile has no more.
    """
    if isinstance(top, torch_pickles.Opaque):
        raise RefusedError(f"holds a whole object ({top.origin}): save its state_dict() in the program that wrote it")
    if not isinstance(top, dict):
        raise RefusedError(f"holds a {type(top).__name__}, not a dictionary of tensors: save a state_dict()")
    for key in _NESTED:
        if isinstance(top.get(key), dict) and (found := _flatten(top[key], limit)):
            return found
    if not (found := _flatten(top, limit)):
        keys = ", ".join(repr(key[:40]) for key in list(top)[:5]) or "nothing"
        raise RefusedError(f"holds no tensors, only {keys}: give a file of weights")
    return found


def _check_printable(name: str):
    """Raises RefusedError if a name isn't printable: names are shown in errors and lists, and could control a terminal."""
    if not name.isprintable():
        raise RefusedError(f"holds the name {name[:40]!a}, not printable: damaged or hostile, not read")


def _flatten(top: dict, limit: int) -> dict[str, torch_pickles.Tensor]:
    found, num_entries = {}, 0

    def visit(values: dict, prefix: str):
        nonlocal num_entries
        for key, value in values.items():
            num_entries += 1
            if num_entries > limit:  # dictionaries that contain each other, or one twice on every level
                raise RefusedError("nests its dictionaries without end: damaged or hostile, not read")
            name = prefix + key
            if len(name) > _MAX_NAME:
                raise RefusedError(f"holds the name {name[:40]!r}..., longer than {_MAX_NAME} characters: not read")
            if isinstance(value, dict):
                visit(value, f"{name}.")
            elif isinstance(value, torch_pickles.Opaque) and value.is_tensor:
                raise RefusedError(f"holds {name[:120]!r} as {value.origin}, which isn't supported: save it as dense float32")
            elif isinstance(value, torch_pickles.Tensor):
                _check_printable(name)
                if name in found:
                    raise RefusedError(f"holds two tensors of the name {name[:120]!r}: save its state_dict alone")
                found[name] = value

    visit(top, "")
    return found


def _read_values(found: dict[str, torch_pickles.Tensor], open_storage, size: int) -> Tensors:
    """Returns name → array, reading each storage once.

    Args:
      found: Name → description of the tensor.
      open_storage: Function key → (context manager of a stream at the storage's first byte, size of the storage in bytes).
      size: Size of the file in bytes.
    """
    raw, tensors, copied_bytes = {}, {}, 0
    for name, tensor in found.items():
        storage, item = tensor.storage, tensor.dtype.itemsize
        if 0 in tensor.shape:
            tensors[name] = np.empty(tensor.shape, tensor.dtype)
            continue
        if storage.key not in raw:
            opened, num_bytes = open_storage(storage.key)
            with opened as stream:
                raw[storage.key] = _read_bytes(stream, num_bytes)
        values = raw[storage.key]
        end = (storage.start + storage.num_values) * storage.dtype.itemsize
        first = storage.start * storage.dtype.itemsize + tensor.offset * item
        reach = item * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)))
        if end > len(values) or first + reach > end:
            raise RefusedError(f"has a tensor {name[:120]!r} that exceeds the {len(values)} bytes of its storage: {_ANEW}")
        array = np.ndarray(tensor.shape, tensor.dtype, values, first, [item * s for s in tensor.strides])
        if not array.flags.c_contiguous:
            # A stride of 0 repeats one value at no cost in the file: copied out, a few bytes could fill any memory.
            copied_bytes += math.prod(tensor.shape) * item
            if copied_bytes > size + _SLACK_BYTES:
                raise RefusedError(f"would expand to more than its {size} bytes ({name[:120]!r}): save contiguous tensors")
            array = array.copy()
        tensors[name] = array
    return tensors


def _read_bytes(stream, num_bytes: int) -> np.ndarray:
    """Returns the stream's next `num_bytes`, read in chunks, so that no second copy of them all is in memory."""
    values = np.empty(num_bytes, np.uint8)
    view, position = memoryview(values), 0
    while position < num_bytes:
        got = stream.readinto(view[position : position + _CHUNK_BYTES])
        if not got:
            raise RefusedError(f"ends inside a tensor: truncated, {_ANEW}")
        position += got
    return values
