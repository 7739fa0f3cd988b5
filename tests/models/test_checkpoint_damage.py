"""Files that are damaged, contradict themselves or hold no weights are refused with one line that names them."""

import argparse
import io
import json
import os
import pathlib
import random
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import torch_files
from torch_files import assert_same, save

from mc3_jax.models import checkpoint_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.empty(2, device="meta"), "_rebuild_meta_tensor"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    ],
    ids=["sparse", "float8", "meta", "conjugate"],
)
def test_a_tensor_that_numpy_cannot_hold_is_refused_by_name_where_it_matters(tmp_path, value, message):
    path = save({"state_dict": {"w": torch.ones(1), "head": {"x": value}}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"'head.x' as .*{message}"):
        checkpoint_files.read_tensors(path)
    path = save({"state_dict": {"w": torch.ones(1)}, "x": value}, tmp_path / "x.pt")
    assert_same(checkpoint_files.read_tensors(path), {"w": torch.ones(1)})


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "../outside.safetensors"}, "names the file '../outside.safetensors'"),
        ({"w": "sub/x.safetensors"}, "names the file"),
        ({"w": "{folder}/../outside.safetensors"}, "names the file"),
        ({"w": ".."}, "names the file"),
        ({"w": "..\\outside.safetensors"}, "names the file"),
        ({"w": "x\0.safetensors"}, "names the file"),
        ({"w": "a.safetensors", "v": "missing.safetensors"}, "missing.safetensors is not a file"),
        ({"w": "a.safetensors", "v": "a.safetensors"}, "'v' is not in 'a.safetensors'"),
        ({"w": "a.safetensors", "v": "b.safetensors"}, "'w' is in 'b.safetensors' and in another"),
        ({"w": 1}, "no weight_map"),
        ({}, "no weight_map"),
        ("a.safetensors", "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_leads_only_to_whole_shards_beside_it(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    for name in ("outside", "model/sub/x", "model/a"):
        safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    safetensors.torch.save_file({"w": torch.ones(1), "v": torch.ones(1)}, folder / "b.safetensors")
    (folder / "config.json").write_text("{}")
    text = json.dumps({"weight_map": weight_map}).replace("{folder}", str(folder))
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint_files.read_tensors(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read .*: give a folder .*, or the workdir of a run"):
        checkpoint_files.read_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match="none of model.safetensors, .*, only 'config.json', 'tf_model.h5'"):
        checkpoint_files.read_tensors(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json (is not JSON|holds a (list|str), not an object)") as error:
        checkpoint_files.read_config(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text('{"hidden_size": 24}')
    assert checkpoint_files.read_config(str(tmp_path)) == {"hidden_size": 24}


def of_numpy() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git-lfs pointer.*`git lfs pull`"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <html>", "web page"),
        (b'{"error": "not found"}', "is JSON"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5.*TensorFlow"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "numpy array without names"),
        (b"\x1f\x8b" + bytes(100), "gzip archive: unpack"),
        (bytes(257) + b"ustar" + bytes(300), "tar archive.*before 0.2"),
        (of_numpy(), "zip archive of numpy"),
        ((100).to_bytes(8, "little") + bytes(112), "seems to be a TFRecord"),
        (b"some text", "not a known kind of weights file"),
        (b"PK\x03\x04" + bytes(100), "truncated zip archive"),
        (b"\x80\x02}.", "is a pickle, but not of torch.save"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02K\x01.", "unknown version of torch.save"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "damaged"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((200).to_bytes(8, "little") + b"{}", "damaged.*header"),
    ],
    ids=lambda value: value[:20].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_another_kind_of_file_is_named_with_the_fix(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint_files.read_tensors(path)
    assert str(error.value).startswith(f"{path} ")
    assert "\n" not in str(error.value)


def test_what_is_missing_or_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path in (tmp_path / "no.pth", tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="is not a file or folder: give .*, or the workdir of a run"):
            checkpoint_files.read_tensors(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 1, "best": 0.5}, "holds no tensors, only 'epoch', 'best'"),
        ({}, "holds no tensors, only nothing"),
        (torch.ones(2), "holds a Tensor, not a dictionary"),
        ([torch.ones(2)], "holds a list, not a dictionary"),
        (argparse.Namespace(a=1), r"holds a whole object \(argparse.Namespace\)"),
        (torch.nn.Linear(1, 1), "would call torch.nn.modules.linear.Linear"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors of the name 'a.b'"),
    ],
    ids=str,
)
def test_a_file_without_a_dictionary_of_tensors_is_refused(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_files.read_tensors(save(value, tmp_path / "x.pt"))


def test_float8_in_safetensors_is_refused_by_name(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="'w' as F8_E4M3"):
        checkpoint_files.read_tensors(tmp_path / "x.safetensors")


def test_names_that_would_steer_a_terminal_are_refused(tmp_path):
    tensors = {"w\x1b[2J": torch.ones(2)}
    save({"state_dict": tensors}, tmp_path / "x.pth")
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(ValueError, match=r"the name 'w\\x1b\[2J', not printable"):
            checkpoint_files.read_tensors(tmp_path / name)
    save({"state_dict": {"w": torch.ones(2), "note\n": 1}}, tmp_path / "x.pth")  # other keys may be anything
    assert list(checkpoint_files.read_tensors(tmp_path / "x.pth")) == ["w"]


ONE = torch_files.dump({"w": torch_files.tensor(torch_files.floats("0", 2), 0, (2,), (1,))})
VALUES = {"data/0": np.ones(2, np.float32).tobytes()}


def test_an_archive_that_was_packed_again_is_read(tmp_path):
    path = torch_files.write_zip(tmp_path / "x.pth", ONE, VALUES, zipfile.ZIP_DEFLATED)
    assert_same(checkpoint_files.read_tensors(path), {"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("entries", "compression", "message"),
    [
        (VALUES | {"byteorder": b"big"}, zipfile.ZIP_STORED, "another byte order"),
        (VALUES | {"constants.pkl": b""}, zipfile.ZIP_STORED, "TorchScript"),
        ({}, zipfile.ZIP_STORED, "lacks the storage '0'"),
        ({"data/0": bytes(4)}, zipfile.ZIP_STORED, "'w' that exceeds the 4 bytes"),
        (VALUES | {"data/1": bytes(10_000_000)}, zipfile.ZIP_DEFLATED, "would unpack from"),
        (VALUES, zipfile.ZIP_BZIP2, "compressed in a way that torch.save never uses"),
        (VALUES, zipfile.ZIP_LZMA, "compressed in a way that torch.save never uses"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_archive_that_cannot_be_right_is_refused(tmp_path, entries, compression, message):
    path = torch_files.write_zip(tmp_path / "x.pth", ONE, entries, compression)
    with pytest.raises(ValueError, match=message):
        checkpoint_files.read_tensors(path)


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = torch_files.write_zip(tmp_path / "x.pth", ONE, VALUES)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", ONE)
    with pytest.raises(ValueError, match="two entries of one name"):
        checkpoint_files.read_tensors(path)


def test_an_archive_of_two_pickles_is_refused(tmp_path):
    path = torch_files.write_zip(tmp_path / "x.pth", ONE, VALUES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", ONE)
    with pytest.raises(ValueError, match="not of torch.save"):
        checkpoint_files.read_tensors(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch_files.tensor(torch_files.floats("0", 10**15), 0, (2,), (1,)), "that exceeds the"),
        (lambda: torch_files.tensor(torch_files.floats("0", 3), 0, (2,), (1,)), "that exceeds the"),
        (lambda: torch_files.tensor(torch_files.floats("0", -1), 0, (2,), (1,)), "without a size"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2.0), 0, (2,), (1,)), "without a size"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), 1, (2,), (1,)), "that exceeds the"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), 0, (2,), (2,)), "that exceeds the"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), 0, (2**62, 2**62), (1, 1)), "that exceeds the"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), 1, (2,), (-1,)), "without a storage or sizes"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), -1, (1,), (1,)), "without a storage or sizes"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), 0, (2,), (1, 1)), "without a storage or sizes"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2), 0, (True,), (1,)), "without a storage or sizes"),
        (lambda: torch_files.tensor(torch_files.floats("0", 1), 0, (10**12,), (0,)), "expand to more"),
        (lambda: torch_files.tensor(torch_files.floats("0", 1), 0, (2**40, 2**40), (0, 0)), "unfolds|damaged"),
        (lambda: torch_files.tensor(torch_files.floats("../0", 2), 0, (2,), (1,)), "lacks the storage"),
        (lambda: torch_files.tensor(torch_files.floats("0", 2, ("1", 1, 2)), 0, (2,), (1,)), "that exceeds the"),
        (lambda: torch_files.tensor(torch_files.Storage(torch.FloatStorage, 0, "cpu", 2), 0, (2,), (1,)), "names a"),
        (lambda: torch_files.tensor(torch_files.Storage("x", "0", "cpu", 2), 0, (2,), (1,)), "only plain numbers"),
        (lambda: torch_files.Call(torch._utils._rebuild_parameter, 1, 2, 3), "holds no tensors"),
        (lambda: torch_files.Call(torch._utils._rebuild_tensor_v2), "damaged"),
    ],
)
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "stream"])
def test_a_tensor_larger_than_what_the_file_holds_is_refused(tmp_path, as_zip, tensor, message):
    code, values = torch_files.dump({"w": tensor()}), VALUES["data/0"]
    if as_zip:
        path = torch_files.write_zip(tmp_path / "x.pth", code, VALUES)
    else:
        path = torch_files.write_stream(tmp_path / "x.pth", code, {"0": (2, values)})
        message += "|does not name"
    with pytest.raises(ValueError, match=message):
        checkpoint_files.read_tensors(path)


@pytest.mark.parametrize("num_values", [3, 2**40, 2**62, -1])
def test_a_storage_of_the_older_format_that_claims_more_than_there_is_is_refused(tmp_path, num_values):
    path = torch_files.write_stream(tmp_path / "x.pth", ONE, {"0": (num_values, VALUES["data/0"])})
    with pytest.raises(ValueError, match="claims a storage of .* truncated"):
        checkpoint_files.read_tensors(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same weights as files: name of the format → bytes."""
    folder = tmp_path_factory.mktemp("whole")
    tensors = {
        name: torch.tensor(array) for name, array in checkpoint_files.read_tensors(GOLDEN / "deit_tiny.pth").items()
    }
    safetensors.torch.save_file(tensors, folder / "safetensors")
    checkpoint = {"model": tensors, "args": argparse.Namespace(lr=1.0, out=pathlib.Path("x"))}
    save(checkpoint, folder / "zip")
    save(checkpoint, folder / "stream", as_zip=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["zip", "stream", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, whole, kind):
    path = tmp_path / "x.pth"
    content = whole[kind]
    for num_bytes in sorted({*range(0, 64, 7), *range(0, len(content), len(content) // 40), len(content) - 1}):
        path.write_bytes(content[:num_bytes])
        with pytest.raises(ValueError, match="empty|truncated|damaged|not a known|TFRecord") as error:
            checkpoint_files.read_tensors(path)
        assert "\n" not in str(error.value)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with random bits flipped and bytes replaced, dropped, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(content))
        match rng.choice(["flip", "flip", "byte", "drop", "double", "cut"]):
            case "flip":
                content[at] ^= 1 << rng.randrange(8)
            case "byte":
                content[at] = rng.randrange(256)
            case "drop":
                del content[at : at + rng.randrange(1, 9)]
            case "double":
                content[at:at] = content[at : at + rng.randrange(1, 40)]
            case "cut" if rng.random() < 0.2:
                del content[at:]
        content = content or bytearray(b"\0")
    return bytes(content)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("egovlp", "stream")]


@pytest.mark.parametrize("kind", ["zip", "safetensors", "pickle in a zip", "pickle in a stream", *SLOW])
def test_damage_ends_in_a_value_error_or_a_good_read(tmp_path, monkeypatch, whole, kind):
    """Also damages the pickle before it is packed, since an archive's checksum would find later damage first."""
    monkeypatch.chdir(tmp_path)
    rng, path = random.Random(kind), tmp_path / "x.pth"
    content = (GOLDEN / "egovlp_tiny.pth").read_bytes() if kind == "egovlp" else whole[kind.split()[-1]]
    archive = zipfile.ZipFile(io.BytesIO(whole["zip"]))
    parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    code, refusals = parts.pop("data.pkl"), []
    for _ in range(300):
        if kind == "pickle in a zip":
            torch_files.write_zip(path, mutate(code, rng), parts)
        elif kind == "pickle in a stream":
            begin = content.index(b"module" if b"module" in content else b"model") - 20
            path.write_bytes(content[:begin] + mutate(content[begin : begin + 4000], rng) + content[begin + 4000 :])
        else:
            path.write_bytes(mutate(content, rng))
        try:
            tensors = checkpoint_files.read_tensors(path)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert all(type(array) is np.ndarray for array in tensors.values())
            assert sum(array.nbytes for array in tensors.values()) < 4 * len(content)
    assert len(refusals) > 20
    assert all("\n" not in line and len(line) < 1000 for line in refusals)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pth"]
