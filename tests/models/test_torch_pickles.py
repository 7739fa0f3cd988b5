"""Pickles are described and never run. Every hostile pickle here is first shown to do harm where it is unpickled."""

import argparse
import codecs
import io
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch_files
from torch_files import call, dotted, literal, name

from mc3_jax.models import checkpoint_files, torch_pickles

WRITERS = [torch_files.write_zip, torch_files.write_stream, torch_files.write_bare]
# Unpickles files as a trusting program would.
VICTIM = """
import copyreg, os, pickle, sys
copyreg.add_extension("os", "system", 240)
for path in sys.argv[1:]:
    try:
        pickle.loads(open(path, "rb").read())
    except Exception as error:
        print(path, repr(error))
"""


def payloads(folder) -> dict[str, tuple[str, bytes]]:
    """Returns case → (name in the refusal, pickle that creates the file `folder`/CASE when it is unpickled)."""
    system = name("os", "system")
    touch = {case: literal(f"touch {folder}/{case}") for case in ("getattr", "partial", "type_v2")}
    shutil_os = call(name("builtins", "getattr"), name("shutil", "os"), literal("system"))
    load_args = {case: literal(f"{folder}/{case}.file") for case in ("torch.load", "serialization", "numpy")}

    def run(case: str, function: bytes) -> bytes:
        return call(function, literal(f"touch {folder}/{case}"))

    def opens(case: str) -> bytes:
        return literal(f"open({f'{folder}/{case}'!r}, 'w')")

    system_of_pathlib = "os.system" if hasattr(pathlib, "os") else "_local.os.system"  # a package since Python 3.13

    cases = {
        "os": ("os.system", run("os", system)),
        "posix": ("posix.system", run("posix", name("posix", "system"))),
        "eval": ("builtins.eval", call(name("builtins", "eval"), opens("eval"))),
        "exec": ("builtins.exec", call(name("builtins", "exec"), opens("exec"))),
        "getattr": ("builtins.getattr", call(shutil_os, touch["getattr"])),
        "popen": ("subprocess.Popen", call(name("subprocess", "Popen"), literal(["touch", f"{folder}/popen"]))),
        "loads": ("pickle.loads", call(name("pickle", "loads"), literal(plain(f"touch {folder}/loads")))),
        "import": ("importlib.import_module", call(name("importlib", "import_module"), literal("evil_module"))),
        "partial": ("functools.partial", call(call(name("functools", "partial"), system, touch["partial"]))),
        "inst": ("os.system", b"(" + literal(f"touch {folder}/inst") + b"ios\nsystem\n"),
        "obj": ("os.system", b"(" + system + literal(f"touch {folder}/obj") + b"o"),
        "dotted": ("shutil.os.system", run("dotted", dotted("shutil", "os.system"))),
        "inert_dotted": (f"pathlib.{system_of_pathlib}", run("inert_dotted", dotted("pathlib", system_of_pathlib))),
        "main_dotted": ("__main__.os.system", run("main_dotted", dotted("__main__", "os.system"))),
        "extension": ("opcode EXT1", run("extension", b"\x82\xf0")),
        "type_v2": (
            "os.system",
            call(
                *(name("torch._tensor", "_rebuild_from_type_v2"), system, literal(None)),
                *(touch["type_v2"] + b"\x85", literal({})),
            ),
        ),
        "numpy": ("numpy.load", call(name("numpy", "load"), load_args["numpy"], literal(None), literal(True))),
        "torch.load": ("torch.load", call(name("torch", "load"), load_args["torch.load"])),
        "serialization": (
            "torch.serialization.load",
            call(name("torch.serialization", "load"), load_args["serialization"]),
        ),
        "hub": ("torch.hub.load", call(name("torch.hub", "load"), literal("a/b:main"), literal("model"))),
    }
    cases = {case: (named, b"\x80\x04" + code + b".") for case, (named, code) in cases.items()}
    # Python 2's names: Python 3 translates them in protocols below 3.
    old = {
        "eval_2": ("builtins.eval", call(name("__builtin__", "eval"), opens("eval_2"))),
        "getoutput_2": ("subprocess.getoutput", run("getoutput_2", name("commands", "getoutput"))),
    }
    return cases | {case: (named, b"\x80\x02" + code + b".") for case, (named, code) in old.items()}


def plain(command: str) -> bytes:
    """Returns a pickle that runs a shell command."""
    return b"\x80\x02" + call(name("os", "system"), literal(command)) + b"."


def plant(folder: pathlib.Path):
    """Writes the files that some payloads load."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (folder / "numpy.file").write_bytes(npy + plain(f"touch {folder}/numpy"))
    for case in ("torch.load", "serialization"):
        torch_files.write_zip(folder / f"{case}.file", plain(f"touch {folder}/{case}"))
    (folder / "evil_module.py").write_text(f"open({f'{folder}/import'!r}, 'w')\n")
    (folder / "hub" / "a_b_main").mkdir(parents=True)
    (folder / "hub" / "a_b_main" / "hubconf.py").write_text(f"def model():\n    open({f'{folder}/hub/ran'!r}, 'w')\n")


def created(folder: pathlib.Path, case: str) -> pathlib.Path:
    return folder / "hub" / "ran" if case == "hub" else folder / case


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(folder, payloads, cases that did harm in a process that unpickled them, its output); what they created is deleted."""
    folder = tmp_path_factory.mktemp("hostile")
    plant(folder)
    cases = payloads(folder)
    paths = [torch_files.write_bare(folder / f"{case}.pickle", code) for case, (_, code) in cases.items()]
    env = {"PYTHONPATH": str(folder), "TORCH_HOME": str(folder), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command = [sys.executable, "-c", VICTIM, *map(str, paths)]
    output = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True).stdout
    deadline = time.monotonic() + 10  # Popen's child may take a moment
    while not all(created(folder, case).exists() for case in cases) and time.monotonic() < deadline:
        time.sleep(0.1)
    worked = {case for case in cases if created(folder, case).exists()}
    for case in worked:
        created(folder, case).unlink()
    return folder, cases, worked, output


@pytest.mark.parametrize("writer", WRITERS, ids=["zip", "stream", "bare"])
@pytest.mark.parametrize("case", payloads(""))
def test_a_hostile_pickle_is_refused_by_name_and_does_not_run(hostile, case, writer, tmp_path):
    folder, cases, worked, output = hostile
    assert case in worked, f"the payload does nothing, so this test could not fail: {output}"
    named, code = cases[case]
    path = writer(tmp_path / "weights.pth", code)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        checkpoint_files.read_tensors(path)
    assert str(error.value).startswith(f"{path} ")
    assert "\n" not in str(error.value)
    time.sleep(0.05)
    assert not created(folder, case).exists()


@pytest.mark.parametrize("where", ["key", "value", "nested", "argument", "state", "storage"])
def test_a_hostile_call_is_refused_wherever_it_hides(tmp_path, where):
    evil = torch_files.Call(os.system, f"touch {tmp_path}/ran")
    value = {
        "key": {evil: 1},
        "value": {"weight": evil},
        "nested": {"optimizer": [({"a": (evil,)},)]},
        "argument": {"args": torch_files.Call(pathlib.PosixPath, evil)},
        "state": {"args": argparse.Namespace(learning_rate=evil)},
        "storage": {"w": torch_files.tensor(torch_files.Storage(evil, "0", "cpu", 1), 0, (1,), (1,))},
    }[where]
    path = torch_files.write_zip(tmp_path / "weights.pth", torch_files.dump(value))
    with pytest.raises(ValueError, match="would call posix.system"):
        checkpoint_files.read_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ("os.environ", name("os", "environ") + literal("MC3_TEST") + literal("1") + b"s"),
        ("os.environ", name("os", "environ") + b"(" + literal("MC3_TEST") + literal("1") + b"u"),
        ("sys.path", name("sys", "path") + literal("/evil") + b"a"),
        ("sys.path", name("sys", "path") + b"(" + literal("/evil") + b"e"),
        ("codecs.Codec", name("codecs", "Codec") + b"N" + literal({"mc3_test": 1}) + b"\x86b"),
    ],
)
def test_what_would_change_an_object_of_this_process_is_refused(tmp_path, named, code):
    changed = {
        "os.environ": lambda: os.environ.pop("MC3_TEST", None),
        "sys.path": lambda: "/evil" in sys.path and not sys.path.remove("/evil"),
        "codecs.Codec": lambda: codecs.Codec.__dict__.get("mc3_test") and not delattr(codecs.Codec, "mc3_test"),
    }[named]
    pickle.loads(b"\x80\x02" + code + b".")
    assert changed(), "the payload does nothing, so this test could not fail"
    path = torch_files.write_zip(tmp_path / "weights.pth", b"\x80\x02" + code + b".")
    with pytest.raises(ValueError, match=f"would change {named}"):
        checkpoint_files.read_tensors(path)
    assert not changed()


def test_a_file_can_not_change_how_the_next_one_is_read(tmp_path):
    """Real unpickling would let a file change the functions that it may call, and so the reading of the next file."""
    golden = pathlib.Path(__file__).parents[1] / "golden" / "egovlp_config.pth"
    before = checkpoint_files.read_tensors(golden)
    state = literal(None) + literal({"__defaults__": (1,), "__setstate__": 1, "__class__": 1}) + b"\x86b0"
    targets = [("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("parse_config", "ConfigParser")]
    code = b"\x80\x02" + b"".join(name(*target) + state for target in targets) + b"}."
    with pytest.raises(ValueError, match="would change torch._utils._rebuild_tensor_v2"):
        checkpoint_files.read_tensors(torch_files.write_zip(tmp_path / "weights.pth", code))
    after = checkpoint_files.read_tensors(golden)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_mere_mention_is_no_call():
    value = {"loss": os.system, "class": subprocess.Popen, "none": None}
    described = torch_pickles.Pickle().load(io.BytesIO(pickle.dumps(value)))
    assert str(described["class"]) == "subprocess.Popen"
    assert str(described["loss"]) == "posix.system"
    assert described["none"] is None


def test_a_class_of_an_importable_module_is_refused_and_one_of_an_unknown_module_is_not(tmp_path, monkeypatch):
    (tmp_path / "somebodys.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    code = b"\x80\x02}" + literal("c") + call(name("somebodys", "Config")) + b"s" + literal("w") + literal(1) + b"s."
    assert torch_pickles.Pickle().load(io.BytesIO(code))["w"] == 1
    monkeypatch.syspath_prepend(tmp_path)
    torch_pickles._is_importable.cache_clear()
    with pytest.raises(torch_pickles.RefusedError, match="would call somebodys.Config"):
        torch_pickles.Pickle().load(io.BytesIO(code))
    torch_pickles._is_importable.cache_clear()
    assert not (tmp_path / "ran").exists(), "the module was imported"
    assert "somebodys" not in sys.modules


def random_value(rng: random.Random, depth: int = 0):
    """Returns a nested value of plain types; parts of it may occur twice."""
    kinds = ["text", "integer", "float", "none", "bool", "bytes"] + ["dict", "list", "tuple", "twice"] * (depth < 4)
    match rng.choice(kinds):
        case "text":
            return rng.choice(["", "weight", "blocks.0.attn", "ü\n'\\", "x" * 300])
        case "integer":
            return rng.choice([0, -1, 255, 256, 65535, 2**31, -(2**31), 2**70, -(2**2100)])
        case "float":
            return rng.choice([0.0, -1.5, float("inf"), 1e-300])
        case "none":
            return None
        case "bool":
            return rng.random() < 0.5
        case "bytes":
            return rng.choice([b"", b"abc", bytes(300)])
        case "dict":
            return {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(5))}
        case "list":
            return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
        case "tuple":
            return tuple(random_value(rng, depth + 1) for _ in range(rng.randrange(6)))
        case "twice":
            return [random_value(rng, depth + 1)] * 2


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_what_pickle_makes_of_them(protocol):
    rng = random.Random(protocol)

    def no_bytes(value):
        # Before protocol 3, Python 3 writes bytes as a call of `_codecs.encode`, which has no value here.
        if isinstance(value, dict):
            return {key: no_bytes(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(no_bytes(item) for item in value)
        return None if isinstance(value, bytes) and protocol < 3 else value

    for _ in range(200):
        value = no_bytes(random_value(rng))
        stream = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
        assert torch_pickles.Pickle().load(stream) == value
        assert stream.read() == b"rest"


@pytest.mark.slow
def test_bombs_end_in_one_line(tmp_path):
    weight = torch_files.dump({"w": torch_files.tensor(torch_files.floats("0", 1), 0, (1,), (1,))})[2:-1]
    doubling = b"}q\x00" + b"".join(
        b"}" + b"".join(literal(key) + b"h" + bytes([i]) + b"s" for key in "ab") + b"q" + bytes([i + 1])
        for i in range(60)
    )
    long_key = b"U\xff" + b"n" * 255
    bombs = {
        # A memo with room for four billion objects; a string longer than memory; a key nested too deep to hash.
        "memo": (b"}r\xff\xff\xff\xff.", "no tensors"),
        "length": (b"\x8e" + (2**60).to_bytes(8, "little") + b".", "damaged"),
        "hash": (b"})" + b"\x85" * 200_000 + b"Ns.", "no tensors"),
        "hash of a storage's key": (b"}.](" + b")" + b"\x85" * 200_000 + b"e.", "does not name"),
        "deep": (b"".join([b"}", literal("k")] * 5000) + b"N" + b"s" * 5000 + b".", "RecursionError|longer than"),
        "cycle": (b"}q\x00" + literal("k") + b"h\x00s.", "without end"),
        "doubling": (doubling + b".", "without end"),
        "names": ((b"}" + long_key) * 9 + weight + b"s" * 9 + b".", "longer than"),
        "unbalanced": (b"s" * 5 + b".", "damaged"),
        "no end": (b"}" * 100, "damaged"),
    }
    for bomb, (code, message) in bombs.items():
        with pytest.raises(ValueError, match=message) as error:
            checkpoint_files.read_tensors(torch_files.write_stream(tmp_path / "weights.pth", b"\x80\x02" + code))
        assert len(str(error.value)) < 600, bomb
        assert "\n" not in str(error.value), bomb


@pytest.mark.slow
def test_a_long_shape_that_many_tensors_share_is_not_looked_through(tmp_path, monkeypatch):
    """Otherwise a file of half a megabyte would keep the reader busy for minutes."""
    looked_at = []
    monkeypatch.setattr(torch_pickles, "_is_sizes", lambda values: looked_at.append(len(values)) or True)
    ones = (1,) * 200_000
    made = torch_files.tensor(torch_files.floats("0", 1), 0, ones, ones)
    with pytest.raises(ValueError, match="has a tensor of more than 64 dimensions: damaged, download"):
        checkpoint_files.read_tensors(torch_files.write_bare(tmp_path / "weights.pth", torch_files.dump({"w": made})))
    made.args += (False,) * 200_000
    with pytest.raises(ValueError, match="has a tensor made of 200006 values"):
        checkpoint_files.read_tensors(torch_files.write_bare(tmp_path / "weights.pth", torch_files.dump({"w": made})))
    assert max(looked_at) < 10  # the values of the storage


def test_a_long_list_is_not_made_a_dictionary_again_and_again():
    pairs = literal([("k", i) for i in range(1000)]) + b"r\xff\xff\x00\x00"
    code = name("collections", "OrderedDict") + b"r\xfe\xff\x00\x00" + pairs + b"\x85R0"
    again = b"j\xfe\xff\x00\x00j\xff\xff\x00\x00\x85R"
    made = torch_pickles.Pickle().load(io.BytesIO(b"\x80\x02" + b"]" + code + again + b"a."))
    assert made == [{}]


def test_more_steps_than_any_checkpoint_has_are_refused(monkeypatch):
    monkeypatch.setattr(torch_pickles, "_MAX_OPCODES", 100)
    torch_pickles.Pickle().load(io.BytesIO(b"N" * 99 + b"."))
    with pytest.raises(torch_pickles.RefusedError, match="more than 100 steps"):
        torch_pickles.Pickle().load(io.BytesIO(b"N" * 100 + b"."))
