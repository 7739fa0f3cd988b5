"""Writes PyTorch files, including some that PyTorch itself would not write, and compares what is read from them."""

import io
import pathlib
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import torch

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def write_zip(path: pathlib.Path, pickled: bytes, entries: dict | None = None, compression=zipfile.ZIP_STORED):
    """Writes PyTorch's zip format and returns `path`; `entries` are further files: name in the archive's folder → bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(entries or {})}.items():
            archive.writestr(f"archive/{name}", value)
    return path


def write_stream(path: pathlib.Path, pickled: bytes, storages: dict | None = None):
    """Writes PyTorch's older format and returns `path`; `storages` are key → (number of values, bytes)."""
    storages = storages or {}
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {"little_endian": True}))
    tail = b"".join(struct.pack("<q", num) + values for num, values in storages.values())
    path.write_bytes(head + pickled + pickle.dumps(list(storages), 2) + tail)
    return path


def write_bare(path: pathlib.Path, pickled: bytes):
    """Writes nothing but the pickle and returns `path`."""
    path.write_bytes(pickled)
    return path


class Storage:
    """Stands for a storage in `dump`, which pickles it as the tuple by which a file refers to a storage."""

    def __init__(self, *pid):
        self.pid = ("storage", *pid)


class Call:
    """An object that is pickled as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Call:
    """Returns an object that is pickled as a tensor of these sizes, be they valid or not."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, None)


def floats(key: str, num_values: int, *view) -> Storage:
    """Returns a reference to a storage of float32 values."""
    return Storage(torch.FloatStorage, key, "cpu", num_values, *view)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


def dump(value, protocol: int = 2) -> bytes:
    """Returns the pickle of a value that may hold `Storage` and `Call`."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def name(module: str, attribute: str) -> bytes:
    """Returns the opcodes that name an attribute of a module."""
    return f"c{module}\n{attribute}\n".encode()


def dotted(module: str, attribute: str) -> bytes:
    """Returns the opcodes that name it in protocol 4, where `attribute` may be a dotted path."""
    return literal(module) + literal(attribute) + b"\x93"


def literal(value) -> bytes:
    """Returns the opcodes of a plain value; they do not use pickle's memo."""
    return pickletools.optimize(pickle.dumps(value, 3))[2:-1]


def call(function: bytes, *args: bytes) -> bytes:
    """Returns the opcodes that call a function; all arguments are opcodes too."""
    return function + b"(" + b"".join(args) + b"tR"


def save(value, path: pathlib.Path, as_zip: bool = True, protocol: int = 2) -> pathlib.Path:
    """Writes a value by PyTorch itself, in its zip format or the older one, and returns `path`."""
    torch.save(value, path, _use_new_zipfile_serialization=as_zip, pickle_protocol=protocol)
    return path


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor's values, bit for bit."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(read: dict[str, np.ndarray], expected: dict[str, torch.Tensor]):
    """Asserts that names, dtypes, shapes and bits are PyTorch's, in C-contiguous, aligned arrays of native byte order."""
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        array, wanted = read[name], to_numpy(tensor)
        assert type(array) is np.ndarray, name
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape), name
        assert array.tobytes() == wanted.tobytes(), name
        assert array.flags.c_contiguous, name
        assert array.flags.aligned, name
        assert array.dtype.isnative, name
