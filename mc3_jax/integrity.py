"""Integrity of checkpoints, so that nothing damaged is loaded: a digest of every file and a checksum of every array.

`manifest.json` holds both, and its own digest. Digests detect damage to the files. Checksums are taken of the values on the
devices, so they also detect errors before the files were written or after they were read; they don't depend on the mesh.
"""

import concurrent.futures
import errno
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

MANIFEST = "manifest.json"
_DIGEST = "sha256"
_THREADS = 8  # for reading files; hashing releases Python's global lock
# Errors of reading that mean damage: the file is missing, is no file, or the disk can't read it.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EBADMSG, errno.EUCLEAN)
# Odd seeds of the two independent 32-bit halves of a checksum (fractional parts of the golden ratio and √2).
_SEEDS = (0x9E3779B9, 0x6A09E667)


class DamagedError(ValueError):
    """Files or arrays of a checkpoint differ from those that were written."""


def seal(folder: pathlib.Path, step: int, arrays: Mapping[str, str]) -> None:
    """Writes the manifest of a checkpoint's folder, after making sure that all its files are on the disk.

    Args:
      folder: Folder that holds all files but the manifest.
      step: Step of the checkpoint.
      arrays: Checksum of each array, by name.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(functools.partial(_digest_file, sync=True), paths)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, _DIGEST: digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    with (folder / MANIFEST).open("x") as file:
        file.write(_render({"step": step, "files": files, "arrays": dict(arrays)}))
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)


def read_manifest(folder: pathlib.Path, step: int) -> dict:
    """Returns the manifest that `seal` wrote: `step`, `files` and `arrays`.

    Raises:
      DamagedError: It is missing, belongs to another step, or any of its bytes has changed.
      OSError: It can't be read for a reason other than damage, such as permissions.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        values = json.loads(text)
        values.pop(_DIGEST)
        intact = text == _render(values).encode()
    except OSError as error:
        raise _unreadable(folder / MANIFEST, MANIFEST, error) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{MANIFEST} has changed since it was written")
    if values["step"] != step:
        raise DamagedError(f"{MANIFEST} belongs to step {values['step']}")
    return values


def check_files(folder: pathlib.Path, manifest: dict, part: int = 0, num_parts: int = 1) -> None:
    """Checks files against the manifest: all of them, or share number `part` of `num_parts` shares.

    Raises:
      DamagedError: A file is missing, has another size or other bytes; the message names the first by name.
      OSError: A file can't be read for a reason other than damage, such as permissions.
    """
    names = sorted(manifest["files"])[part::num_parts]

    def problem(name: str) -> str:
        known = manifest["files"][name]
        try:
            size = (folder / name).stat().st_size
            if size != known["bytes"]:
                return f"{name} has {size} bytes instead of {known['bytes']}"
            if _digest_file(folder / name) != known[_DIGEST]:
                return f"{name} has changed since it was written"
        except OSError as error:
            found = _unreadable(folder / name, name, error)
            if not isinstance(found, DamagedError):
                raise found from error
            return str(found)
        return ""

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(problem, names):
            if found:
                raise DamagedError(found)


def checksums(tree) -> tuple[list[str], UInt32[Array, "n 2"]]:
    """Returns the names of a tree's arrays and a checksum of each, computed in one pass on the devices.

    A checksum is the sum over all elements, mod 2³² and for two seeds, of mix(bits ⊕ mix(place ⊕ seed)), where `place` is
    the element's index in the flattened global array and mix is MurmurHash3's 32-bit finaliser (public domain, Appleby). As
    mix permutes the 32-bit words, every change of a single element changes the checksum. As sums of integers don't depend on
    the order, the layout on the devices doesn't matter.

    Args:
      tree: Arrays on the devices, all on the same mesh.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    mesh = named[0][1].sharding.mesh
    one, together = _on_mesh(NamedSharding(mesh, PartitionSpec()))
    sums = []
    for _, leaf in named:
        sums.append(one(leaf))
        if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
            # On a CPU the devices share threads: many programs with collectives at once use them up and deadlock.
            sums[-1].block_until_ready()
    return names, together(sums)


def to_hex(names: list[str], sums: UInt32[Array, "n 2"]) -> dict[str, str]:
    """Returns the checksums in hexadecimal, by name, as this process's first device has them; waits for the devices."""
    rows = np.asarray(sums.addressable_data(0))
    return {name: f"{high:08x}{low:08x}" for name, (high, low) in zip(names, rows, strict=True)}


def check_arrays(tree, known: Mapping[str, str]) -> None:
    """Checks the arrays of a tree against known checksums, on every device of this process.

    Args:
      tree: The arrays, all that were saved or some of them.
      known: Checksum of each saved array, by name.

    Raises:
      DamagedError: An array has other values than were saved.
    """
    names, sums = checksums(tree)
    expected = np.array([[int(known[name][i : i + 8], 16) for i in (0, 8)] for name in names], np.uint32)
    for shard in sums.addressable_shards:
        wrong = np.flatnonzero((np.asarray(shard.data) != expected).any(1))
        if len(wrong):
            raise DamagedError(f"array {names[wrong[0]]} has other values than were saved ({len(wrong)} in all)")


def sync_folder(folder: pathlib.Path) -> None:
    """Writes a folder's list of names to the disk, so that new names survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_file(path: pathlib.Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, _DIGEST).hexdigest()


def _unreadable(path: pathlib.Path, name: str, error: OSError) -> Exception:
    """Returns a DamagedError if the error means damage, else an OSError that names the file (permissions, for example)."""
    if error.errno in _DAMAGE:
        return DamagedError(f"{name} can't be read: {error.strerror}")
    return OSError(error.errno, error.strerror, str(path))


def _render(values: dict) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps(values | {_DIGEST: digest}, indent=1) + "\n"


def _mix(word: Array) -> Array:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _checksum(leaf: Array) -> UInt32[Array, "2"]:
    """Returns the checksum of one array; see `checksums`."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize])
    bits, place, stride = bits.astype(jnp.uint32), jnp.zeros(leaf.shape, jnp.uint32), 1
    for dim in reversed(range(leaf.ndim)):
        # The index counts mod 2³², so larger arrays use some values twice.
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[dim]
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(place ^ jnp.uint32(seed)))) for seed in _SEEDS])


@functools.cache
def _on_mesh(everywhere: NamedSharding):
    """Returns two jitted functions: the checksum of an array, and the stack of checksums. Each shape is compiled once."""
    return jax.jit(_checksum, out_shardings=everywhere), jax.jit(jnp.stack, out_shardings=everywhere)
