"""Clips on disk and on their way to the device: numpy and grain only, never jax."""
