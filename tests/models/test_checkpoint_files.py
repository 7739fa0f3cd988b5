"""Weight files are read bit for bit as PyTorch, safetensors and transformers wrote them, whatever else they hold."""

import argparse
import collections
import datetime
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
import torch_files
import transformers
from torch_files import assert_same, save

from mc3_jax.models import checkpoint_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FORMATS = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "stream"])
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
)


@pytest.fixture
def parse_config(monkeypatch):
    """Provides the module whose class EgoVLP's checkpoints pickle, so that PyTorch can open them."""
    module = types.ModuleType("parse_config")
    module.ConfigParser = type("ConfigParser", (), {"__module__": "parse_config"})
    monkeypatch.setitem(sys.modules, "parse_config", module)


@pytest.mark.parametrize(
    ("name", "key"),
    [("egovlp_tiny", "state_dict"), ("egovlp_config", "state_dict"), ("ast_tiny_148", None), ("deit_tiny", None)],
)
@pytest.mark.parametrize("as_zip", [None, True, False], ids=["as it is", "zip", "stream"])
def test_a_golden_checkpoint_reads_as_pytorch_reads_it(tmp_path, parse_config, name, key, as_zip):
    path = GOLDEN / f"{name}.pth"
    checkpoint = torch.load(path, weights_only=False)
    if as_zip is not None:
        path = save(checkpoint, tmp_path / "again.ckpt", as_zip)
    assert_same(checkpoint_files.read_tensors(path), checkpoint[key] if key else checkpoint)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number_keeps_its_bits(tmp_path, as_zip, dtype):
    bits = torch.tensor(np.random.default_rng(0).integers(0, 256, 240, np.uint8))
    values = (bits > 127) if dtype == torch.bool else bits.view(dtype)
    tensors = {"values": values, "one": values[1], "view": values.reshape(3, -1)[1:, ::2], "none": values[:0]}
    assert_same(checkpoint_files.read_tensors(save(tensors, tmp_path / "x.pt", as_zip)), tensors)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_layout_of_a_tensor_is_read(tmp_path, as_zip, protocol):
    base = torch.arange(60.0).reshape(3, 4, 5)
    extra = torch.nn.Parameter(base[0].clone())
    extra.no_weight_decay = True
    attribute = base.clone()
    attribute.note = "an attribute"
    tensors = {
        "base": base,
        "same storage": base,
        "offset": base[1],
        "transposed": base.permute(2, 0, 1),
        "strided": base[::2, 1::2, ::3],
        "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 5),
        "scalar": torch.tensor(3.5),
        "0-d view": base[2, 3, 4],
        "empty": torch.empty(0, 7),
        "empty view": base[:, :0],
        "parameter": torch.nn.Parameter(base[:, 1]),
        "parameter with attributes": extra,
        "tensor with attributes": attribute,
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "buffer": torch.nn.Buffer(torch.ones(3)),
    }
    read = checkpoint_files.read_tensors(save(tensors, tmp_path / "x.pt", as_zip, protocol))
    assert_same(read, tensors)
    assert np.shares_memory(read["base"], read["same storage"])
    assert np.shares_memory(read["base"], read["offset"])
    assert not np.shares_memory(read["base"], read["transposed"])


@FORMATS
def test_the_weights_of_a_training_checkpoint_are_found(tmp_path, as_zip):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    weights, other = module.state_dict(), {"w": torch.ones(1)}
    training = {"epoch": 3, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "best": float("inf")}
    for checkpoint in (
        weights,
        {"state_dict": weights, **training},
        {"model": other, "model_state_dict": other, "state_dict": weights},
        {**training, "model": other, "model_state_dict": weights},
        {**training, "model": weights},
        {"state_dict": {"note": "no tensors"}, "model": weights, **training},
        {"state_dict": "a path", "model": weights, **training},
    ):
        assert_same(checkpoint_files.read_tensors(save(checkpoint, tmp_path / "x.pt", as_zip)), weights)
    nested = {"audio": {"0": other, "step": 1, 7: torch.zeros(2)}, "video": collections.OrderedDict(w=torch.ones(3))}
    expected = {"audio.0.w": other["w"], "audio.7": torch.zeros(2), "video.w": torch.ones(3)}
    assert_same(checkpoint_files.read_tensors(save(nested, tmp_path / "x.pt", as_zip)), expected)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_else_a_checkpoint_pickles_does_not_matter(tmp_path, monkeypatch, as_zip, protocol):
    module = types.ModuleType("modules_nobody_has")
    source = """
import collections, enum
class Plain: pass
class Slots:
    __slots__ = ("a", "b")
class Dict(dict): pass
class List(list): pass
class Set(set): pass
class Args(tuple):
    def __getnewargs__(self): return (tuple(self),)
class Keywords:
    def __new__(cls, *, a): return super().__new__(cls)
    def __getnewargs_ex__(self): return (), {"a": 1}
class State:
    def __getstate__(self): return (1, 2)
    def __setstate__(self, state): raise RuntimeError("ran")
class Kind(enum.Enum):
    A = 1
Pair = collections.namedtuple("Pair", "a b")
"""
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "modules_nobody_has", module)
    slots, plain, keywords = module.Slots(), module.Plain(), module.Keywords(a=1)
    slots.a, slots.b = 1, [plain]
    plain.itself = plain
    objects = [
        *(plain, slots, module.Dict(a=1), module.List([1, 2]), module.Set([1]), module.Args((1, 2)), module.State()),
        *(keywords, module.Kind.A, module.Pair(1, 2), module.Plain, argparse.Namespace(a=1, b=[plain])),
        *(types.SimpleNamespace(a=1), pathlib.PurePosixPath("/a"), pathlib.Path("b"), pathlib.PureWindowsPath("c")),
        *(np.float32(1), np.arange(6).reshape(2, 3)[:, ::2], np.dtype("float32"), np.array("text"), np.bool_(True)),
        *(torch.device("cuda:0"), torch.Size([1, 2]), torch.float32, torch.strided, torch.nn.functional.relu),
        *(datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1), collections.deque([1])),
        *(collections.Counter(a=1), collections.defaultdict(list, a=[1]), {1, 2}, frozenset([3]), b"", b"\xff", 1j),
        *(bytearray(b"x"), range(3), slice(1, 2), 2**70, None, True, float("nan"), "text", Ellipsis, NotImplemented),
    ]
    if protocol < 4:
        objects.remove(keywords)  # pickled as a call of functools.partial, which could call anything
    checkpoint = {"state_dict": {"w": torch.ones(2), "_extra_state": objects}, "objects": objects}
    hashable = [plain, module.Kind.A, module.Pair(1, 2), (1, (2,)), None, 1.5, torch.float32, b"x", np.float32(1)]
    checkpoint["keys"] = dict.fromkeys(hashable, "value")
    path = save(checkpoint, tmp_path / "x.pt", as_zip, protocol)
    monkeypatch.delitem(sys.modules, "modules_nobody_has")
    assert_same(checkpoint_files.read_tensors(path), {"w": torch.ones(2)})


def test_views_of_storages_in_old_files_are_read(tmp_path):
    values = torch.arange(10.0)
    view = torch_files.floats("7", 10, ("8", 3, 4))
    code = torch_files.dump(
        {
            "all": torch_files.tensor(torch_files.floats("7", 10, None), 0, (10,), (1,)),
            "view": torch_files.tensor(view, 1, (3,), (1,)),
        }
    )
    path = torch_files.write_stream(tmp_path / "x.pth", code, {"7": (10, values.numpy().tobytes())})
    expected = torch.load(path, weights_only=False)
    assert expected["view"].tolist() == [4.0, 5.0, 6.0]
    assert_same(checkpoint_files.read_tensors(path), expected)


def test_an_ordered_dictionary_of_python_2_is_read(tmp_path):
    pairs = [["w", torch_files.tensor(torch_files.floats("0", 2), 0, (2,), (1,))]]
    code = torch_files.dump(torch_files.Call(collections.OrderedDict, pairs))
    path = torch_files.write_stream(tmp_path / "x.pth", code, {"0": (2, np.ones(2, np.float32).tobytes())})
    assert_same(checkpoint_files.read_tensors(path), {"w": torch.ones(2)})


def test_reading_needs_no_pytorch_and_imports_nothing_that_a_file_names():
    script = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from mc3_jax.models import checkpoint_files
assert checkpoint_files.read_tensors({str(GOLDEN / "egovlp_config.pth")!r})
assert not {{"parse_config", "argparse.Namespace"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def tiny_models() -> dict:
    vit = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"vocab_size": 40, "max_position_embeddings": 16, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    return {
        "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**text)),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**vit, image_size=32, patch_size=16)),
        "ast": lambda: transformers.ASTModel(transformers.ASTConfig(**vit, max_length=64, num_mel_bins=32)),
    }


@pytest.mark.parametrize("kind", tiny_models())
@pytest.mark.parametrize("layout", ["safetensors", "shards", "bfloat16", "bin", "bin shards"])
def test_a_folder_of_hugging_face_is_read(tmp_path, kind, layout):
    torch.manual_seed(0)
    model = tiny_models()[kind]()
    if layout == "bfloat16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB" if "shards" in layout else "5GB")
    written = {}
    for shard in tmp_path.glob("*.safetensors"):
        written |= safetensors.torch.load_file(shard)
    if "bin" in layout:
        for shard in tmp_path.glob("*.safetensors"):
            torch.save(safetensors.torch.load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
        for file in tmp_path.glob("model*"):
            if file.suffix == ".json":
                file.write_text(file.read_text().replace(".safetensors", ".bin"))
            file.rename(tmp_path / f"pytorch_{file.name}".replace("safetensors", "bin"))
        index = tmp_path / "pytorch_model.bin.index.json"
        if index.exists():
            index.write_text(index.read_text().replace('"model-', '"pytorch_model-'))
    assert len(list(tmp_path.iterdir())) > (3 if "shards" in layout else 1)
    read = checkpoint_files.read_tensors(tmp_path)
    assert_same({name: read[name] for name in written}, written)
    # transformers renames some tensors when it saves them, so only the shapes of all are compared.
    sizes = [sorted(tuple(x.shape) for x in tensors.values()) for tensors in (read, model.state_dict())]
    assert sizes[0] == sizes[1]
    assert checkpoint_files.read_config(tmp_path)["model_type"] in (kind, "audio-spectrogram-transformer")


def test_safetensors_are_read_whatever_byte_the_length_of_their_header_begins_with(tmp_path):
    path, begins = tmp_path / "model.safetensors", set()
    for length in range(1, 257):
        safetensors.torch.save_file({"w" * length: torch.ones(1)}, path)
        begins.add(path.read_bytes()[0])
        assert list(checkpoint_files.read_tensors(path)) == ["w" * length]
    assert 0x80 in begins  # as a pickle begins


def test_safetensors_are_preferred(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_same(checkpoint_files.read_tensors(tmp_path), {"w": torch.zeros(1)})
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_same(checkpoint_files.read_tensors(tmp_path), {"w": torch.ones(1)})
