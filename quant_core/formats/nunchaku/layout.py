"""Where nunchaku's kernels want each element of a layer, as pure index maps to and from the layout of memory.

Derived from the fragments of mma.m16n8k64 (PTX ISA, "Matrix Fragments") as nunchaku's GEMM reads them: a warp
owns 128 out-channels and 64 in-channels at a time, a lane (n % 8, k) holds words of 32 bits. Codes of INT4
and of NVFP4 lie alike. Every map is a reshape, a transposition of axes and a reshape, so it is exact, works
on memory-mapped tensors and takes one copy of the tensor. N: out-features, K: in-features, R: rank, G = K /
64.
"""

import torch

TILE = 128  # out-channels of a warp; nunchaku pads N and K to multiples of it
RANK = 16  # the low-rank branch is stored in blocks of 16 x 16
GROUP = 64
MICRO = 4  # scales of 16 channels that lie together
AWQ_ROWS = 4  # rows that the modulation layers interleave
# Of a modulation layer's (shift, scale, gate), once or twice: nunchaku's biases of the scales are 1 higher.
SCALES = slice(1, None, 3)

# Sizes of the stored axes; the permutation puts them in natural order. -1 is the axis whose size depends on
# the layer.
# Stored: n tile, k tile, n pack 8, n lane 8, k lane 4, n half 2, k half 2; words of 8 channels.
_WEIGHT = (
    0,
    2,
    5,
    3,
    1,
    6,
    4,
)
_SCALE = (1, 0, 2, 4, 3, 5)  # stored: n tile, group, 16 channels 8, lane 4, half 2, pair 2
_MICRO = (0, 4, 3, 2, 1, 5)  # stored: n tile, k tile, n lane 8, 8 channels 4, 32 channels 4, group 4
_DOWN = (1, 4, 2, 0, 5, 3, 6)  # stored: k tile, r tile, r lane 8, k lane 4, r half 2, k half 2, pair 2
_UP = (0, 4, 2, 1, 5, 3, 6)  # stored: n tile, r tile, n lane 8, r lane 4, n half 2, r half 2, pair 2


def _forward(tensor, sizes, axes):
    return tensor.reshape(sizes).permute(axes)


def _backward(tensor, sizes, axes):
    """The inverse of `_forward`: `tensor` has the elements in natural order, `sizes` and `axes` are those of
    `_forward`."""
    inverse = [axes.index(i) for i in range(len(axes))]
    return tensor.reshape([sizes[a] for a in axes]).permute(inverse)


def _weight_sizes(n, k):
    return n // TILE, k // GROUP, 8, 8, 4, 2, 2


def unpack_weight(stored: torch.Tensor) -> torch.Tensor:
    """`qweight`, int8 (N, K / 2), to the packed codes of memory, int8 (N, K / 2): two's complement or e2m1,
    the even channel in the low nibble.

    A word of 32 bits holds eight neighbouring in-channels, the first lowest, in both layouts (little endian),
    so only words move: row n = 128 tile + 16 pack + 8 half + lane, channel k = 64 tile + 32 half + 8 lane +
    nibble.
    """
    n, half = stored.shape
    words = stored.contiguous().view(torch.int32)
    return _forward(words, _weight_sizes(n, 2 * half), _WEIGHT).reshape(n, half // 4).view(torch.int8)


def pack_weight(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_weight`. N and K must be multiples of 128."""
    n, half = packed.shape
    words = packed.contiguous().view(torch.int32)
    return _backward(words, _weight_sizes(n, 2 * half), _WEIGHT).reshape(n, half // 4).view(torch.int8)


def unpack_scale(stored: torch.Tensor) -> torch.Tensor:
    """`wscales`, 16 bit (G, N), to weight scales (G, N). The shape of the stored tensor is nominal: the tiles
    of 128 out-channels come first, all groups of one tile behind each other. Channel n = 128 tile + 16 a + 8
    half + 2 lane + pair.
    """
    groups, n = stored.shape
    return _forward(stored, (n // TILE, groups, 8, 4, 2, 2), _SCALE).reshape(groups, n)


def pack_scale(scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_scale`."""
    groups, n = scale.shape
    return _backward(scale, (n // TILE, groups, 8, 4, 2, 2), _SCALE).reshape(groups, n)


def _micro_sizes(n, groups):
    return n // TILE, groups // MICRO, 8, 4, 4, MICRO


def unpack_micro_scale(stored: torch.Tensor) -> torch.Tensor:
    """`wscales` of NVFP4, e4m3 (G, N) with G = K / 16, to weight scales (N, G), as the operator has them. The
    shape is as nominal as that of `unpack_scale`.

    A lane hands its product of m16n8k64 the four scales of a row's 64 channels as one word: row n = 128 tile
    + 32 a + 8 b + lane (PTX ISA, "Block Scaling"; deepcompressor's `pack_micro_scale`).
    """
    groups, n = stored.shape
    return _forward(stored, _micro_sizes(n, groups), _MICRO).reshape(n, groups)


def pack_micro_scale(scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_micro_scale`."""
    n, groups = scale.shape
    return _backward(scale, _micro_sizes(n, groups), _MICRO).reshape(groups, n)


def unpack_vector(stored: torch.Tensor) -> torch.Tensor:
    """`bias` and `wcscales` (N,) or `smooth_factor` (K,), which lie as the scales of one group, to channel
    order."""
    return unpack_scale(stored[None])[0]


def pack_vector(vector: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_vector`."""
    return pack_scale(vector[None])[0]


def unpack_down(stored: torch.Tensor) -> torch.Tensor:
    """`proj_down`, 16 bit (K, R), to proj_down (K, R). Blocks of 16 in-channels by 16 ranks, in each the
    fragment of the transposed matrix: rank r = 16 tile + 8 half + lane, channel k = 16 tile + 8 half + 2 lane
    + pair.
    """
    k, rank = stored.shape
    return _forward(stored, (k // 16, rank // RANK, 8, 4, 2, 2, 2), _DOWN).reshape(rank, k).T.contiguous()


def pack_down(down: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_down`."""
    k, rank = down.shape
    return _backward(down.T, (k // 16, rank // RANK, 8, 4, 2, 2, 2), _DOWN).reshape(k, rank)


def unpack_up(stored: torch.Tensor) -> torch.Tensor:
    """`proj_up`, 16 bit (N, R), to proj_up (N, R): row n = 16 tile + 8 half + lane, rank r = 16 tile + 8 half
    + 2 lane + pair."""
    n, rank = stored.shape
    return _forward(stored, (n // 16, rank // RANK, 8, 4, 2, 2, 2), _UP).reshape(n, rank)


def pack_up(up: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_up`."""
    n, rank = up.shape
    return _backward(up, (n // 16, rank // RANK, 8, 4, 2, 2, 2), _UP).reshape(n, rank)


# Modulation layers (AWQ, W4A16): 4 rows take turns with 64 channels each, two runs of four words. Channel 8 i
# + 2 j + pair of a run of 32 is nibble i + 4 pair of word j: the order in which the kernel's conversion of a
# word to 16 bit leaves the eight values. In memory the channels 8 i + 2 j and the next are byte j of word i:
# between the two, bytes of a 4 x 4 matrix change sides with their nibbles.


def unpack_awq(stored: torch.Tensor) -> torch.Tensor:
    """`qweight` of a modulation layer, int32 (N / 4, K / 2), to packed codes 0..15, int8 (N, K / 2), the even
    channel in the low nibble.

    Scales and zeros (G, N) lie in natural order.
    """
    n, k = stored.shape[0] * AWQ_ROWS, stored.shape[1] * 2
    words = (
        stored.reshape(
            n // AWQ_ROWS,
            k // 64,
            AWQ_ROWS,
            2,
            4,
        )
        .permute(
            4,
            0,
            2,
            1,
            3,
        )
        .reshape(4, -1)
    )
    out = torch.zeros_like(words)
    for i in range(4):
        for j in range(4):
            shifted = words[j] >> 4 * i
            out[i] |= (shifted & 0x0F | shifted >> 12 & 0xF0) << 8 * j
    return out.T.contiguous().view(torch.int8).reshape(n, k // 2)


def pack_awq(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_awq`. N must be a multiple of 4 and K of 64."""
    n, k = packed.shape[0], packed.shape[1] * 2
    words = packed.contiguous().view(torch.int32).view(-1, 4).T.contiguous()
    out = torch.zeros_like(words)
    for j in range(4):
        for i in range(4):
            byte = words[i] >> 8 * j
            out[j] |= (byte & 0x0F | (byte & 0xF0) << 12) << 4 * i
    return (
        out.view(
            4,
            n // AWQ_ROWS,
            AWQ_ROWS,
            k // 64,
            2,
        )
        .permute(
            1,
            3,
            2,
            4,
            0,
        )
        .reshape(n // AWQ_ROWS, k // 2)
    )


def deinterleave(rows: torch.Tensor, splits: int) -> torch.Tensor:
    """Rows (N, ...) of a modulation layer from nunchaku's order, row channel * splits + part, to part * N /
    splits + channel: shift, scale and gate as whole blocks, as the model's own layer has them."""
    return rows.unflatten(0, (-1, splits)).transpose(0, 1).flatten(0, 1)


def interleave(rows: torch.Tensor, splits: int) -> torch.Tensor:
    """The inverse of `deinterleave`."""
    return rows.unflatten(0, (splits, -1)).transpose(0, 1).flatten(0, 1)
