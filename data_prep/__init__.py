"""Converts sources on disk to ArrayRecord clips, in the format of `mc3_jax.data.records`; never imported by mc3_jax."""
