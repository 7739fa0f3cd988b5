"""Position tables fitted to another size, against PyTorch's interpolation and the rules of AST and Frozen in Time."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mc3_jax.models import fitting

RNG = np.random.default_rng(0)


def torch_bilinear(grid, size):
    image = torch.from_numpy(grid.astype(np.float64)).permute(2, 0, 1)[None]  # float32 would round coordinates
    return functional.interpolate(image, size=size, mode="bilinear")[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(24, 101), (30, 5), (7, 24), (1, 1)])
def test_stretching_is_pytorchs_bilinear_interpolation(size):
    grid = RNG.normal(size=(24, 24, 3)).astype(np.float32)
    np.testing.assert_allclose(fitting.stretch_grid(grid, size), torch_bilinear(grid, size), atol=1e-6)


def test_a_grid_is_cut_in_the_middle_where_it_is_long_enough_and_stretched_where_not():
    grid = RNG.normal(size=(24, 24, 3)).astype(np.float32)
    np.testing.assert_array_equal(fitting.cut_or_stretch_grid(grid, (12, 14)), grid[6:18, 5:19])
    odd = fitting.cut_or_stretch_grid(grid, (13, 15))  # AST's rule: 12 - n // 2 : 12 - n // 2 + n
    np.testing.assert_array_equal(odd, grid[6:19, 5:20])
    both = fitting.cut_or_stretch_grid(grid, (12, 101))
    np.testing.assert_allclose(both, torch_bilinear(grid[6:18], (12, 101)), atol=1e-6)
    np.testing.assert_array_equal(fitting.cut_or_stretch_grid(grid, (24, 24)), grid)


def test_an_audioset_grid_is_cut_as_ast_cuts_it():
    table = RNG.normal(size=(2 + 12 * 101, 3)).astype(np.float32)
    fitted, note = fitting.fit_audio_positions(table, (12, 14), 12, "x")
    grid = table[2:].reshape(12, 101, 3)
    np.testing.assert_array_equal(fitted[:2], table[:2])
    np.testing.assert_array_equal(fitted[2:].reshape(12, 14, 3), grid[:, 50 - 7 : 50 - 7 + 14])
    assert note == "position grid 12x101 cut or stretched to 12x14 (mel x time)"


def test_positions_that_are_no_grid_are_refused():
    table = np.zeros((2 + 170, 3), np.float32)
    with pytest.raises(ValueError, match="x.pth: 170 positions don't form a square"):
        fitting.fit_audio_positions(table, (12, 14), None, "x.pth")
    with pytest.raises(ValueError, match="170 positions don't form a grid of 12 patches along mel: set num_mel"):
        fitting.fit_audio_positions(table, (12, 14), 12, "x.pth")
    with pytest.raises(ValueError, match="171 positions can't be fitted to 196 patches"):
        fitting.fit_image_positions(table, 196, "x.pth")


def test_temporal_positions_are_cut_padded_with_zeros_or_interpolated():
    table = RNG.normal(size=(4, 6)).astype(np.float32)
    assert fitting.fit_temporal(table, 4, "zeros") == (table, None)
    cut, note = fitting.fit_temporal(table, 2, "linear")
    np.testing.assert_array_equal(cut, table[:2])
    assert "cut from 4 to 2" in note
    padded, _ = fitting.fit_temporal(table, 9, "zeros")
    np.testing.assert_array_equal(padded, np.concatenate([table, np.zeros((5, 6))]))
    stretched, _ = fitting.fit_temporal(table, 9, "linear")
    # As Frozen in Time does with load_temporal_fix="bilinear".
    image = torch.from_numpy(table.astype(np.float64))[None, None]
    expected = functional.interpolate(image, (9, 6), mode="bilinear", align_corners=True)[0, 0]
    np.testing.assert_allclose(stretched, expected, atol=1e-6)


def test_image_positions_keep_the_class_tokens_and_interpolate_the_grid():
    table = RNG.normal(size=(1 + 49, 5)).astype(np.float32)
    fitted, note = fitting.fit_image_positions(table, 196, "x")
    np.testing.assert_array_equal(fitted[0], table[0])
    expected = torch_bilinear(table[1:].reshape(7, 7, 5), (14, 14)).reshape(196, 5)
    np.testing.assert_allclose(fitted[1:], expected, atol=1e-6)
    assert "7x7 interpolated to 14x14" in note


def test_the_patch_kernel_of_a_grey_image_is_the_sum_over_colours():
    kernel = RNG.normal(size=(16 * 16 * 3, 5)).astype(np.float32)
    grey = RNG.normal(size=256).astype(np.float32)
    summed = fitting.sum_over_rgb(kernel, 256)
    np.testing.assert_allclose(grey @ summed, np.repeat(grey, 3) @ kernel, rtol=1e-4, atol=1e-4)
