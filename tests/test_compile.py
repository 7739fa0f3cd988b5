"""`python -m mc3_jax.compile`: what it prints, what it refuses, and what the paper's step does on eight chips."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from mc3_jax import (
    compile as compile_lib,
    config as config_lib,
    hlo,
    mesh as mesh_lib,
    mfu,
    topology as topology_lib,
    weights,
)
from mc3_jax.data import loader
from tests import world
from tests.test_fits import CANVAS_PX, small_config

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="pip install '.[compile]'")


def small_report(config, topology="cpu:8"):
    return compile_lib.compile_step(config, topology, num_samples=3000, canvas_px=CANVAS_PX, num_clips=1000)


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command with the paper's config and returns the finished process."""
    command = [sys.executable, "-m", "mc3_jax.compile", "--config=configs/mc3_ego4d.py", *flags]
    return subprocess.run(command, cwd=world.ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.large
def test_the_report_of_a_small_step():
    config = small_config(scan_layers=True)
    report = small_report(config)
    num_parameters = sum(shape.size for shape in weights.param_shapes(config.model).values())
    assert report.phase == "refine"
    assert report.mesh_shape == (8, 1)
    assert report.aliased >= 3 * 4 * num_parameters  # parameters and both moments are updated in place
    assert report.counts.payload("all-gather") == 3 * 16 * config.model.embed_dim * 4
    assert report.counts.unknown_loops == []
    # Each chip does the share of the model's FLOPs that falls to its rows, and those of the front end in addition.
    assert report.counts.flops > report.model_flops / 8
    text = "\n".join(report.lines())
    assert "cpu:8: 8 chips, mesh data 8 x fsdp 1, batch 16, phase 'refine'" in text
    assert re.search(r"all-gather +0\.002 MB of f32 per chip in 3", text)
    assert "MFU" not in text  # the peak of a CPU is not known


@pytest.mark.large
def test_sharded_parameters_are_gathered_once_and_activations_stay_where_they_are():
    config = small_config()
    config.fsdp = 4
    counts, num_parameters = small_report(config).counts, sum(s.size for s in weights.param_shapes(config.model).values())
    embeddings = 3 * 16 * config.model.embed_dim * 4
    assert counts.payload("all-gather") == 4 * num_parameters + embeddings
    assert counts.payload("all-to-all") == 0
    assert counts.payload("collective-permute") < embeddings  # far less than the activations of one block


@pytest.mark.slow  # the paper's sizes
def test_model_flops_of_the_papers_video_tower_are_those_counted_by_hand():
    config = config_lib.Config()
    width, depth, mlp, frames, places = 768, 12, 3072, 4, 196
    patches = frames * places
    tokens = 1 + patches
    qkv, out, transform = 3 * width**2, width**2, 2 * width * mlp
    products = patches * 16 * 16 * 3 * width + width * 256  # patch embedding, projection
    products += depth * tokens * (qkv + out) + depth * tokens * qkv  # time attention, and qkv of space attention
    products -= patches * width**2  # in the last block only the class token has a query
    products += ((depth - 1) * tokens + 1) * (out + transform)  # the last block continues with the class token alone
    # Scores: a patch attends to its position in all frames and to the class token, the class token attends to all tokens.
    over_time = patches * (frames + 1) + tokens
    over_space = patches * (places + 1)
    products += 2 * width * (depth * over_time + (depth - 1) * over_space + depth * tokens)
    phase = config.phases[0]
    phase.trainable = ("audio",)
    without = compile_lib.model_flops(config, phase)
    phase.trainable = ("audio", "video")
    assert compile_lib.model_flops(config, phase) - without == 2 * 2 * products  # backward: twice the forward pass


def test_the_data_a_step_is_compiled_for_are_those_that_are_trained_on(data):
    config = world.small_config(data)
    config.data.split, config.data.num_samples = "train+validation", 16_000
    source = loader.open_split(config.data.dir, "train+validation", 4)
    wanted = {"num_samples": 16_000, "canvas_px": source.info.canvas_px, "num_clips": len(source)}
    assert compile_lib._data_shapes(config) == wanted
    for phase in config.phases:
        phase.pairs, phase.consensus_weight = ("al",), 0.0
    config.model.video.num_frames = 5  # no phase looks at video
    assert compile_lib._data_shapes(config) == wanted


@pytest.mark.slow  # compiles two steps
def test_a_loss_over_frozen_towers_costs_their_forward_pass_alone():
    config = small_config()
    all_learn = compile_lib.model_flops(config, config.phases[1])
    config.phases[1].trainable = ("audio", "text")
    assert all_learn / 3 < compile_lib.model_flops(config, config.phases[1]) < all_learn


@pytest.mark.slow  # compiles two steps
def test_towers_that_a_phase_does_not_look_at_cost_nothing():
    config = small_config()
    whole = compile_lib.model_flops(config, config.phases[0])
    parts = [dataclasses.replace(config.phases[0], pairs=(pair,)) for pair in ("av", "al", "vl")]
    np.testing.assert_allclose(sum(compile_lib.model_flops(config, part) for part in parts), 2 * whole)


def test_the_share_of_the_peak_is_that_of_all_devices_and_none_for_unknown_devices(monkeypatch):
    config, mesh = small_config(), mesh_lib.make_mesh()
    with jax.set_mesh(mesh):
        assert mfu.share_of_peak(config, config.phases[1], mesh) is None
        monkeypatch.setitem(topology_lib._DEVICE_KINDS, jax.devices()[0].device_kind, "h200")
        share = mfu.share_of_peak(config, config.phases[1], mesh)
    assert share == compile_lib.model_flops(config, config.phases[1]) / (8 * 989e12)
    assert topology_lib.chip_of("NVIDIA H200").gpu is not None
    assert topology_lib.chip_of("TPU v5 lite") == topology_lib.CHIPS["v5e"]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "--topology=v9:2x2 is unknown: choose one of h200:N, h100:N, a100:N"),
        ("h100:2x8", "--topology=h100:2x8 is unknown"),
        ("h100:9", "has 9 chips: 1 to 8 are supported"),
        ("v5e", "--topology=v5e is unknown"),
        ("v5p:4x4", "--topology=v5p:4x4 is unknown: .* v5p:AxBxC"),
        ("v5e:32x32", "has 1024 chips: 1 to 256 are supported"),
        ("cpu:64", "JAX was started with only 8 CPU devices"),
        ("cpu:0", "cpu:0 is unknown"),
    ],
)
def test_unknown_topologies_are_refused(topology, message):
    with pytest.raises(ValueError, match=message):
        topology_lib.find_devices(topology)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"needs libtpu, which is not installed: pip install '\.\[compile\]'"):
        topology_lib.find_devices("v5e:2x4")


def test_without_the_cuda_plug_in_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs JAX's CUDA plug-in, not installed here: pip install '\.\[compile_gpu\]'"):
        topology_lib.find_devices("h200:8")


def test_jax_sees_cudnn_and_compute_capability_of_the_gpu_that_is_compiled_for():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # the names are JAX's own: it may rename them

    asked = cudnn.check_cudnn_version, cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal
    for chip, is_hopper in (("a100", False), ("h100", True), ("h200", True)):
        with topology_lib.cudnn_of(topology_lib.CHIPS[chip]):
            assert cudnn.check_cudnn_version() == topology_lib.CUDNN_VERSION
            assert cudnn.check_compute_capability("8.0")
            assert cudnn.check_compute_capability("9.0") == is_hopper
            assert cudnn.is_cuda_compute_capability_equal("9.0") == is_hopper
            assert not cudnn.check_compute_capability("10.0")
    for chip in (None, topology_lib.CHIPS["v5e"]):
        with topology_lib.cudnn_of(chip):
            assert cudnn.check_cudnn_version is asked[0]
    assert asked == (cudnn.check_cudnn_version, cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal)


def test_the_usable_memory_of_a_gpu_is_the_share_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert topology_lib.CHIPS["h100"].usable_gib == 0.75 * 79
    assert topology_lib.CHIPS["v5e"].usable_gib == 16
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in compile_lib._advice("h100:8", 70, 59.25)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in compile_lib._advice("v5e:2x4", 17, 16)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert topology_lib.CHIPS["h100"].usable_gib == 0.9 * 79


def test_attention_that_a_topology_can_not_have_is_refused():
    config = small_config()
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    with pytest.raises(ValueError, match=r"model\.attention = 'cudnn' needs .* but this is bfloat16, .* on cpu"):
        small_report(config)


def test_a_config_without_phases_has_no_step():
    config = dataclasses.replace(small_config(), phases=[])
    with pytest.raises(ValueError, match=r"^config.phases is empty: there is no train step to compile, name a --config"):
        small_report(config)


def test_what_does_not_divide_is_refused():
    config = small_config()
    config.data.batch_size = 12
    with pytest.raises(ValueError, match="data.batch_size = 12 is not divisible by the 8 devices"):
        small_report(config)
    config.data.batch_size, config.data.chunk_size = 16, 4
    with pytest.raises(ValueError, match="data.chunk_size = 4 is not divisible by the 8 devices"):
        small_report(config)
    config.data.chunk_size, config.fsdp = 0, 3
    with pytest.raises(ValueError, match="config.fsdp = 3 does not divide the 8 devices"):
        small_report(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.65G) exceeds "
            "available HBM (15.75G).",
            r"does not fit v5e:2x4: needs 16.65 GiB per chip, 15.75 GiB are available, 0.90 GiB are missing; try .*remat",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20480.00M of "
            "15.75G hbm. Exceeded hbm capacity by 4.25G.",
            r"needs 20.00 GiB per chip, 15.75 GiB are available, 4.25 GiB are missing",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_reported_with_the_missing_memory(text, message):
    error = compile_lib._too_large(jax.errors.JaxRuntimeError(text), "v5e:2x4")
    assert isinstance(error, MemoryError)
    assert re.search(message, str(error))
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert compile_lib._too_large(other, "v5e:2x4") is other


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ((), 2, "--topology is missing"),
        (("--topology=v9:2x2",), 2, "v9:2x2 is unknown"),
        (("--topology=cpu:7",), 2, "data.batch_size = 256 is not divisible by the 7 devices"),
        (("--topology=cpu:2", "--phase=none"), 2, "--phase=none is not a phase of this config: choose one of align, refine"),
    ],
)
def test_bad_commands_end_with_one_line(flags, status, message):
    done = run(*flags)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr


@needs_libtpu
@pytest.mark.large
@pytest.mark.timeout(1500)
def test_on_eight_chips_embeddings_are_replicated_once_and_gradients_reduced_in_float32():
    """The paper's sizes, scanned layers. Without XLA's optimisations collectives are the same, in a third of the time."""
    flags = ["--config.model.scan_layers=True", "--config.model.remat=full", "--topology=v5e:2x4"]
    done = run(*flags, JAX_OPTIMIZATION_LEVEL="O0")
    assert done.returncode == 0, done.stderr[-3000:]
    sent = re.findall(r"^(\S+) +([\d.]+) MB of (\w+) per chip", done.stdout, re.MULTILINE)
    payload = {(kind, dtype): float(megabytes) * 1e6 for kind, megabytes, dtype in sent}
    num_parameters = sum(shape.size for shape in weights.param_shapes(config_lib.ModelConfig()).values())
    assert set(payload) == {("all-gather", "f32"), ("all-reduce", "f32")}
    assert payload["all-gather", "f32"] == pytest.approx(3 * 256 * 256 * 4, rel=0.02)
    assert payload["all-reduce", "f32"] == pytest.approx(4 * num_parameters, rel=0.02)
    assert "counted once" not in done.stdout
    assert set(hlo.COLLECTIVES) >= {kind for kind, _ in payload}


DEPTHS = [f"--config.model.{tower}.depth={depth}" for tower, depth in (("audio", 3), ("video", 3), ("text", 1))]
needs_cuda = pytest.mark.skipif("CUDA_PLUGIN_PATH" not in os.environ, reason="make test-large installs it apart")


def run_for_gpus(*flags: str, patch: str = "") -> str:
    """Returns what the command prints for the paper's widths and few layers; the Python code `patch` runs before it."""
    path = os.pathsep.join([os.environ["CUDA_PLUGIN_PATH"], os.environ.get("PYTHONPATH", "")])
    program = f"{patch}\nimport runpy\nrunpy.run_module('mc3_jax.compile', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", program, "--config=configs/mc3_ego4d.py", *DEPTHS, *flags]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=world.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def payloads(report: str) -> dict[tuple[str, str], float]:
    """Returns (kind of collective, dtype) → bytes of its results on each chip, as reported."""
    sent = re.findall(r"^(\S+?) *([\d.]+) MB of (\w+) per chip", report, re.MULTILINE)
    return {(kind, dtype): float(megabytes) * 1e6 for kind, megabytes, dtype in sent}


def memory_and_traffic(report: str) -> tuple[float, float]:
    """Returns (memory in GiB, memory traffic in GB) of one chip, as reported."""
    memory = re.search(r"memory per chip +([\d.]+) GiB", report)[1]
    return float(memory), float(re.search(r"memory traffic +([\d.]+) GB", report)[1])


@needs_cuda
@pytest.mark.large
@pytest.mark.timeout(900)
def test_on_a_gpu_gradients_of_queries_keys_and_values_are_written_once():
    anew = "from mc3_jax.models import layers, video\nlayers.written_once = video.written_once = lambda x: x"
    flags = ("--topology=h200:1", "--config.data.batch_size=64")
    (memory, traffic), (more_memory, more_traffic) = (memory_and_traffic(run_for_gpus(*flags, patch=p)) for p in ("", anew))
    assert memory <= more_memory
    assert traffic < 0.97 * more_traffic


@needs_cuda
@pytest.mark.large
@pytest.mark.timeout(900)
def test_on_eight_gpus_attention_is_cudnns_and_embeddings_are_gathered_once():
    """At the paper's widths, with audio and video towers of 3 layers and a text tower of 1."""
    found = {}
    for form in ("auto", "einsum"):
        report = run_for_gpus("--topology=h100:8", f"--config.model.attention={form}")
        payload = payloads(report)
        assert payload["all-gather", "f32"] == pytest.approx(3 * 256 * 256 * 4, rel=0.02)
        assert ("all-reduce", "f32") in payload
        assert " GiB of 79 GiB, of which JAX uses 59.25:" in report
        flops, model = map(float, re.search(r"FLOPs +([\d.]+) T per chip .* ([\d.]+) T", report).groups())
        assert flops == pytest.approx(model / 8, rel=0.05)
        found[form] = memory_and_traffic(report)
    assert found["auto"][0] < found["einsum"][0]
    assert found["auto"][1] < 0.6 * found["einsum"][1]  # cuDNN's scores never reach the memory


@needs_cuda
@pytest.mark.large
@pytest.mark.timeout(900)
def test_on_eight_gpus_sharded_parameters_are_gathered_and_gradients_scattered_in_float32():
    """XLA must not split cuDNN's heads, which can't be split, nor move activations."""
    payload, text = payloads(run_for_gpus("--topology=h100:8", "--config.fsdp=8")), config_lib.TextConfig()
    word_embeddings = 4 * text.vocab_size * text.width  # each device computes its share of their gradient
    gathered, scattered = payload["all-gather", "f32"], payload["reduce-scatter", "f32"]
    assert scattered == pytest.approx(gathered - word_embeddings, rel=0.02)
    others = {key: num for key, num in payload.items() if key not in (("all-gather", "f32"), ("reduce-scatter", "f32"))}
    assert sum(others.values()) < 0.1 * word_embeddings
    assert sum(num for (_, dtype), num in others.items() if dtype != "f32") < 0.001 * gathered
