"""Tests run on the CPU, as eight devices, with every annotated shape checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jaxtyping

# An int is a float where a float is asked for (PEP 484).
jaxtyping.install_import_hook(
    ["mc3_jax", "data_prep"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
