"""Scales of blocks as cuBLAS takes them, in tiles of 128 rows and 4 columns in which every 32nd row stands
together: how nvfp4 and mxfp8 lie in a file."""

import torch
from torch.nn.functional import pad

TILE = 128, 4
_ROWS = 32  # of a tile that stand 128 / 32 = 4 side by side


def tiled_shape(rows: int, columns: int) -> tuple[int, ...]:
    """What a matrix of scales is filled up to."""
    return tuple(-(-size // tile) * tile for size, tile in zip((rows, columns), TILE, strict=True))


def natural(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix (rows, columns) out of its tiles, any dtype."""
    height, width = tiles.shape
    split = tiles.reshape(
        height // TILE[0],
        width // TILE[1],
        _ROWS,
        TILE[0] // _ROWS,
        TILE[1],
    )
    return split.permute(
        0,
        3,
        2,
        1,
        4,
    ).reshape(height, width)[:rows, :columns]


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `natural`, filled up with zeros: float8 (rows, columns) -> the shape of
    `tiled_shape`."""
    (rows, columns), (height, width) = scales.shape, tiled_shape(*scales.shape)
    whole = pad(scales.view(torch.uint8), (0, width - columns, 0, height - rows))
    split = whole.view(
        height // TILE[0],
        TILE[0] // _ROWS,
        _ROWS,
        width // TILE[1],
        TILE[1],
    )
    return (
        split.permute(
            0,
            3,
            2,
            1,
            4,
        )
        .reshape(height, width)
        .view(scales.dtype)
    )
