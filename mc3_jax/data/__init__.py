"""Reads clips from disk and makes batches of them, with numpy and Grain only, never jax."""
