"""From sources on disk to ArrayRecord clips. Writes what `mc3_jax.data.records` describes; never imported by mc3_jax."""
