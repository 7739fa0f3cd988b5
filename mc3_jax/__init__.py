"""MC3 in JAX: how actions sound, learned from narrated egocentric video (SoundingActions, CVPR 2024)."""

__version__ = "0.1.0"


def load(path, **options):
    """Returns a trained model ready to embed; see `mc3_jax.embedder.load`."""
    from mc3_jax import embedder  # not at the top: data preparation imports this package and has no use for jax

    return embedder.load(str(path), **options)
