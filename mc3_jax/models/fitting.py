"""Fits the tables of a checkpoint to a model of another size: position grids, temporal positions, patch kernels.

Rules of the sources. AST (YuanGongND/ast, `src/models/ast_models.py`) cuts the centre out of a grid that is large enough and
stretches one that is not, axis by axis, and sums the patch kernel over RGB. Frozen in Time (`model/model.py`) cuts temporal
positions, or appends zeros, or interpolates. Interpolation is linear between pixel centres, as PyTorch's `bilinear`.
numpy only.
"""

import math

import numpy as np
from jaxtyping import Float


def _linear(num_source: int, num_target: int, *, align_corners: bool) -> Float[np.ndarray, "target source"]:
    """Returns the matrix of linear interpolation along an axis, constant beyond the outermost points."""
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
    """Returns AST's fit of a grid: per axis the centre where it is long enough, else interpolated."""
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
    """Returns the temporal positions of a clip with `num_positions` frames, and what was done to them, or None.

    Args:
      table: Of the checkpoint.
      num_positions: Wanted. Fewer are the first of the table.
      fill: Where more are wanted, "zeros" appends zeros and "linear" interpolates from the first to the last.
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
    """Returns the positions of class token, distillation token and AST's (mel, time) grid, and what was done, or None.

    Args:
      table: Of the checkpoint, the two tokens first.
      grid: (mel, time) patches wanted.
      num_mel_patches: Along mel in the checkpoint's grid, an AST's; None where it is an image's, square.
      path: For the error.

    Raises:
      ValueError: The checkpoint's grid can't be told.
    """
    num = max(len(table) - 2, 0)
    from_image = num_mel_patches is None
    rows = math.isqrt(num) if from_image else num_mel_patches
    if rows < 1 or num % rows or (from_image and rows * rows != num):
        want = "a square" if from_image else f"a grid of {rows} patches along mel"
        raise ValueError(f"{path}: {num} positions are not {want}: give the config the checkpoint's num_mel and stride_px")
    have = (rows, num // rows)
    if have == grid:
        return table, None
    fitted = cut_or_stretch_grid(table[2:].reshape(*have, -1), grid).reshape(-1, table.shape[1])
    done = f"position grid {have[0]}x{have[1]} cut or stretched to {grid[0]}x{grid[1]} (mel x time)"
    return np.concatenate([table[:2], fitted]), done


def fit_image_positions(
    table: Float[np.ndarray, "n w"], num_patches: int, path: str
) -> tuple[Float[np.ndarray, "m w"], str | None]:
    """Returns the positions of the class token and a frame's square grid, and what was done to them, or None.

    Raises:
      ValueError: The checkpoint's grid or ours is not square.
    """
    have, want = math.isqrt(len(table) - 1), math.isqrt(num_patches)
    if have < 1 or have**2 != len(table) - 1 or want**2 != num_patches:
        raise ValueError(f"{path}: {len(table) - 1} positions can't be fitted to {num_patches} patches: not square grids")
    if have == want:
        return table, None
    grid = stretch_grid(table[1:].reshape(have, have, -1), (want, want)).reshape(num_patches, -1)
    return np.concatenate([table[:1], grid]), f"position grid {have}x{have} interpolated to {want}x{want}"


def sum_over_rgb(kernel: Float[np.ndarray, "rows w"], num_rows: int) -> Float[np.ndarray, "rows_out w"]:
    """Returns an image's patch kernel [(i j c), w] summed over its three colours, for a spectrogram's one channel."""
    return kernel.reshape(num_rows, 3, -1).sum(axis=1)
