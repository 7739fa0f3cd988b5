"""Machines to compile for that need not be at hand: the chips of a topology, their peaks, and their devices."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental import topologies

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
MAX_GPUS = 8  # in a node
CUDNN_VERSION = 91000  # 9.10, which programs for GPUs are compiled for
TOPOLOGIES = "h200:N, h100:N, a100:N, v5e:AxB, v6e:AxB, v5p:AxBxC or cpu:N"
MAX_CHIPS = 256
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak performance of a chip.

    TPUs' numbers are from https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e (read in November 2026), GPUs' from NVIDIA's
    data sheets of the SXM cards, without sparsity.

    Attributes:
      flops_per_s: Peak FLOP/s of bfloat16 matrix products.
      memory_gib: Size of its HBM; see `usable_gib`.
      memory_bytes_per_s: Bandwidth of its HBM.
      link_bytes_per_s: Bytes per second sent over all links to other chips: half of the "bidirectional" bandwidth in the
        tables.
      dims: Number of dimensions of a slice; 1 for a node of GPUs.
      gpu: For GPUs, the properties that XLA needs to compile.
    """

    flops_per_s: float
    memory_gib: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    dims: int
    gpu: "Gpu | None" = None

    @property
    def usable_gib(self) -> float:
        """Memory that a program may use: on a GPU the share that JAX takes; on a TPU all, in truth a little less."""
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) if self.gpu else 1.0
        return share * self.memory_gib


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of an NVIDIA GPU, as CUDA reports them; others are the same for all GPUs here.

    Attributes:
      name: Device kind in JAX.
      capability: CUDA compute capability (major, minor).
      num_cores: Number of streaming multiprocessors.
      core_fpus: Float32 units of a multiprocessor.
      core_shared_bytes: Shared memory of a multiprocessor; a block may use 1 KiB less.
      l2_bytes: Size of the L2 cache.
      clock_ghz: Highest clock rate.
    """

    name: str
    capability: tuple[int, int]
    num_cores: int
    core_fpus: int
    core_shared_bytes: int
    l2_bytes: int
    clock_ghz: float

    def describe(self, chip: Chip) -> str:
        """Returns XLA's `GpuTargetConfigProto` as text (xla/stream_executor/device_description.proto)."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 registers_per_core_limit: 65536
              registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              shared_memory_per_block: 49152 shared_memory_per_core: {self.core_shared_bytes}
              shared_memory_per_block_optin: {self.core_shared_bytes - 1024} l2_cache_size: {self.l2_bytes}
              core_count: {self.num_cores} fpus_per_core: {self.core_fpus} clock_rate_ghz: {self.clock_ghz}
              memory_bandwidth: {int(chip.memory_bytes_per_s)} device_memory_size: {int(chip.memory_gib * GIB)}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            runtime_version {{ major: 12 minor: 8 patch: 0 }}
            dnn_version_info {{ major: {CUDNN_VERSION // 10000} minor: {CUDNN_VERSION // 100 % 100} }}
            platform_name: "CUDA" device_description_str: "{self.name}"
        """


CHIPS = {
    "v5e": Chip(197e12, 16, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 32, 1638e9, 400e9, 2),
    "a100": Chip(312e12, 79, 2039e9, 300e9, 1, Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167_936, 40 * 2**20, 1.41)),
    "h100": Chip(989e12, 79, 3350e9, 450e9, 1, Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233_472, 50 * 2**20, 1.98)),
    "h200": Chip(989e12, 139, 4800e9, 450e9, 1, Gpu("NVIDIA H200", (9, 0), 132, 128, 233_472, 60 * 2**20, 1.98)),
}


# Device kind in JAX → chip; GPUs are listed only if their data sheet is used above.
_DEVICE_KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100", **{chip.gpu.name: name for name, chip in CHIPS.items() if chip.gpu},
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with this JAX device kind; None if it is unknown."""
    return CHIPS.get(_DEVICE_KINDS.get(device_kind, ""))


def find_chip(topology: str) -> Chip | None:
    """Returns the chip that a topology consists of; None for CPUs and unknown kinds."""
    return CHIPS.get(topology.partition(":")[0])


def find_devices(topology: str) -> list:
    """Returns the devices of a topology. TPUs and GPUs among them can only be compiled for, not run on.

    Raises:
      ValueError: The topology is unknown or too large, or the compiler for it isn't installed.
    """
    kind, _, size = topology.partition(":")
    if kind == "cpu" and size.isdecimal() and 0 < int(size) <= MAX_CHIPS:
        return _cpu_devices(int(size))
    known = f"{TOPOLOGIES}, e.g. h200:8"
    dims = [int(d) for d in size.split("x")] if re.fullmatch(r"\d+(x\d+)*", size) else []
    if kind not in CHIPS or len(dims) != CHIPS[kind].dims:
        raise ValueError(f"--topology={topology} is unknown: choose one of {known}")
    num_chips = functools.reduce(lambda a, b: a * b, dims)
    most = MAX_GPUS if CHIPS[kind].gpu else MAX_CHIPS
    if not 0 < num_chips <= most:
        raise ValueError(f"--topology={topology} has {num_chips} chips: 1 to {most} are supported")
    if CHIPS[kind].gpu:
        return _gpu_devices(topology, CHIPS[kind], num_chips)
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ValueError(f"--topology={topology} needs libtpu, which is not installed: pip install '.[compile]'")
    # libtpu shall not look for a TPU, nor for other processes that use it, and shall log nothing.
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_HOST_BOUNDS": "1,1,1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3",
    }  # fmt: skip
    one = {"chips_per_host_bounds": (1, 1, 1)} if num_chips == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices)
    except (RuntimeError, ValueError) as error:  # jax.errors.JaxRuntimeError is one
        raise ValueError(f"--topology={topology}: {' '.join(str(error).split())[:300]}; try {known}") from error


def _gpu_devices(topology: str, chip: Chip, num_gpus: int) -> list:
    if not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
        raise ValueError(f"--topology={topology} needs JAX's CUDA plug-in, not installed here: pip install '.[compile_gpu]'")
    # The versions of the CUDA libraries don't matter, since none of them is run.
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        described = {"target_config": chip.gpu.describe(chip), "topology": f"1x1x{num_gpus}"}
        return list(topologies.get_topology_desc(topology, "cuda", **described).devices)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--topology={topology}: {reason}: pip install '.[compile_gpu]' in a new environment") from error


@contextlib.contextmanager
def cudnn_of(chip: Chip | None) -> Iterator[None]:
    """Makes JAX's checks for cuDNN's attention see the chip's GPU, which need not be here, inside the context.

    Raises:
      ValueError: This version of JAX has other checks.
    """
    if chip is None or chip.gpu is None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def parse(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    answers = {
        "check_cudnn_version": lambda: CUDNN_VERSION,
        "check_compute_capability": lambda least: chip.gpu.capability >= parse(least),
        "is_cuda_compute_capability_equal": lambda wanted: chip.gpu.capability == parse(wanted),
    }
    missing = [name for name in answers if not hasattr(cudnn, name)]
    if missing:
        raise ValueError(f"--topology: JAX {jax.__version__} lacks cuDNN's {', '.join(missing)}: use JAX 0.10 to 0.12")
    with mock.patch.multiple(cudnn, **answers):
        yield


def _cpu_devices(num_devices: int) -> list:
    if num_devices > len(jax.devices("cpu")):
        raise ValueError(
            f"--topology=cpu:{num_devices}: JAX was started with only {len(jax.devices('cpu'))} CPU devices"
        )
    return jax.devices("cpu")[:num_devices]
