"""MC3 in JAX: how actions sound, learned from narrated egocentric video (SoundingActions, CVPR 2024)."""

__version__ = "0.1.0"
