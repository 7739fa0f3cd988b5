"""Tests run on the CPU, as eight devices, with every annotated shape checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jaxtyping

jaxtyping.install_import_hook(
    ["mc3_jax.models", "mc3_jax.losses", "mc3_jax.data", "mc3_jax.evals", "data_prep"], "beartype.beartype"
)
