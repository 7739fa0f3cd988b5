"""Fits the tables of a checkpoint to a model of another size: position grids, temporal positions, patch kernels.

The rules are those of the sources. AST (YuanGongND/ast, `src/models/ast_models.py`) treats each axis of a position grid by
itself: it cuts out the centre if the grid is long enough and interpolates otherwise. It sums the patch kernel over RGB.
Frozen in Time (`model/model.py`) cuts temporal positions, or appends zeros, or interpolates. Grids are interpolated between
pixel centres, like PyTorch's `bilinear`. Uses numpy only.
"""

import math

import numpy as np
from jaxtyping import Float


def _linear(num_source: int, num_target: int, *, align_corners: bool) -> Float[np.ndarray, "target source"]:
    """Returns the matrix that interpolates linearly along an axis, constant beyond the outermost points.

    With `align_corners`, the first and last points of source and target coincide; without, the edges of their pixels do.
    """
    if align_corners:
        at = np.arange(num_target) * ((num_source - 1) / max(num_target - 1, 1))
    else:
        at = (np.arange(num_target) + 0.5) * (num_source / num_target) - 0.5
    at = np.clip(at, 0, num_source - 1)
    return np.maximum(1 - np.abs(np.arange(num_source) - at[:, None]), 0)


def stretch_grid(
    grid: Float[np.ndarray, "rows columns w"], size: tuple[int, int]
) -> Float[np.ndarray, "new_rows new_columns w"]:
    """Returns a grid interpolated bilinearly to `size`."""
    for axis, length in enumerate(size):
        if grid.shape[axis] != length:
            matrix = _linear(grid.shape[axis], length, align_corners=False)
            grid = np.moveaxis(np.tensordot(matrix, grid.astype(np.float64), (1, axis)), 0, axis).astype(np.float32)
    return grid


def cut_or_stretch_grid(
    grid: Float[np.ndarray, "rows columns w"], size: tuple[int, int]
) -> Float[np.ndarray, "new_rows new_columns w"]:
    """Returns a grid fitted to `size` as in AST: each axis is cut to its centre if long enough, else interpolated."""
    for axis, length in enumerate(size):
        have = grid.shape[axis]
        if length <= have:
            first = have // 2 - length // 2
            grid = np.take(grid, range(first, first + length), axis)
        else:
            grid = stretch_grid(grid, (length, grid.shape[1]) if axis == 0 else (grid.shape[0], length))
    return grid


def fit_temporal(
    table: Float[np.ndarray, "n w"], num_positions: int, fill: str
) -> tuple[Float[np.ndarray, "m w"], str | None]:
    """Returns temporal positions for clips of `num_positions` frames, and a text that says what was done, None if nothing.

    Args:
      table: Temporal positions of the checkpoint.
      num_positions: Number of positions to return. If the table has more, the first are taken.
      fill: If the table has fewer, "zeros" appends zeros and "linear" interpolates from its first position to its last.
    """
    have = len(table)
    if num_positions == have:
        return table, None
    if num_positions < have:
        return table[:num_positions], f"temporal positions cut from {have} to {num_positions}"
    if fill == "linear":
        matrix = _linear(have, num_positions, align_corners=True)
        return (matrix @ table).astype(np.float32), f"temporal positions interpolated from {have} to {num_positions}"
    zeros = np.zeros((num_positions - have, table.shape[1]), table.dtype)
    return np.concatenate([table, zeros]), f"temporal positions padded with zeros from {have} to {num_positions}"


def fit_audio_positions(
    table: Float[np.ndarray, "n w"], grid: tuple[int, int], num_mel_patches: int | None, path: str
) -> tuple[Float[np.ndarray, "m w"], str | None]:
    """Returns positions of class token, distillation token and AST's grid, and a text that says what was done, or None.

    Args:
      table: Positions in the checkpoint, those of the two tokens first.
      grid: Number of patches (along mel, along time) of the model.
      num_mel_patches: Number of patches along mel in the grid of the checkpoint, an AST; None if the checkpoint is an image
        model's, with a square grid.
      path: Path of the checkpoint, for error messages.

    Raises:
      ValueError: The number of positions does not fit such a grid.
    """
    num = max(len(table) - 2, 0)
    from_image = num_mel_patches is None
    rows = math.isqrt(num) if from_image else num_mel_patches
    if rows < 1 or num % rows or (from_image and rows * rows != num):
        want = "a square" if from_image else f"a grid of {rows} patches along mel"
        raise ValueError(f"{path}: {num} positions don't form {want}: set num_mel and stride_px to the checkpoint's")
    have = (rows, num // rows)
    if have == grid:
        return table, None
    fitted = cut_or_stretch_grid(table[2:].reshape(*have, -1), grid).reshape(-1, table.shape[1])
    done = f"position grid {have[0]}x{have[1]} cut or stretched to {grid[0]}x{grid[1]} (mel x time)"
    return np.concatenate([table[:2], fitted]), done


def fit_image_positions(
    table: Float[np.ndarray, "n w"], num_patches: int, path: str
) -> tuple[Float[np.ndarray, "m w"], str | None]:
    """Returns positions of the class token and a frame's square grid, and a text that says what was done, None if nothing.

    Raises:
      ValueError: The grid of the checkpoint or of the model is not square.
    """
    have, want = math.isqrt(len(table) - 1), math.isqrt(num_patches)
    if have < 1 or have**2 != len(table) - 1 or want**2 != num_patches:
        raise ValueError(f"{path}: {len(table) - 1} positions can't be fitted to {num_patches} patches: both must be squares")
    if have == want:
        return table, None
    grid = stretch_grid(table[1:].reshape(have, have, -1), (want, want)).reshape(num_patches, -1)
    return np.concatenate([table[:1], grid]), f"position grid {have}x{have} interpolated to {want}x{want}"


def sum_over_rgb(kernel: Float[np.ndarray, "rows w"], num_rows: int) -> Float[np.ndarray, "rows_out w"]:
    """Returns an image model's patch kernel [(i j c), w] summed over its 3 colours, for a spectrogram's single channel."""
    return kernel.reshape(num_rows, 3, -1).sum(axis=1)
