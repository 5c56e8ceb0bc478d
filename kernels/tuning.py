"""Tile sizes: shipped defaults for each kind of card, measured choices from the user's cache in front of
them."""

import json
import re
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import platformdirs

from .cards import M8N8K32, MMA
from .plan import CHANNEL, GROUP, SLICE
from .target import MIN_INT4, Target


@dataclass(frozen=True)
class Tile:
    """A block's share of the product: bm tokens, bn out-channels, bk bytes of a weight row a step.

    group_m: rows of tiles walked together. rank_block: columns of the low-rank branch a step. gluon: for
    `quant_linear.hopper`, or for `quant_linear.ampere`, where bk may be several groups.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group_m: int = 8
    rank_block: int = 32
    gluon: bool = False


@dataclass(frozen=True)
class QuantizerTile:
    """rows tokens a block, `tiles` times 64 channels a step."""

    rows: int
    tiles: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Problem:
    """What the choice depends on. block: bytes that bk must divide (equal, for groups); 0 for any."""

    kernel: str
    planes: int
    scales: int
    swap: bool
    tokens: int
    channels: int
    row_bytes: int
    block: int = 0

    @property
    def key(self) -> str:
        """Of the cache. Tokens by powers of two: a batch of 4608 and one of 4500 take the same tile."""
        tokens = 1 << max(self.tokens - 1, 15).bit_length()
        size = f"{tokens}x{self.channels}x{self.row_bytes}"
        return f"{self.kernel}/{self.planes}/{self.scales}/{size}/{self.block}"


def quantizer_tile(target: Target, rank: int, rotation: int) -> QuantizerTile:
    """Few rows, so that there are programs enough for every multiprocessor."""
    if target.backend == "hip":
        return QuantizerTile(16, 1, stages=2 if target.card.waves_of_64 else 1)
    # 16 tokens, the least of a 16-bit product: at M = 4608 that is 288 programs, with which the RTX 4090's
    # quantizer is modelled at the bandwidth of memory; with 32, 144 programs took 1.7 times as long.
    # Four tiles that are mixed: with 16 tokens 4 warps spill on sm_86 and sm_89, 8 on sm_120.
    if rotation > 128 and rank <= 32:
        return QuantizerTile(32, 2, warps=8)
    # A third stage takes a fourth block's shared memory on the RTX 3090 and 4090 (46 us are 63 with it), and
    # helps elsewhere (A100: 71 and 58 us).
    deep = 0 < rank <= 32 and (target.card.int4 != MMA or target.card.w8a8)
    return QuantizerTile(16, 2, stages=3 if deep else 2)


@dataclass(frozen=True)
class KroneckerTile:
    """rows tokens a program, one after another. sides, slices: p1, p2 and the slices of a part, padded to
    powers of two. batched: one product a slice. shared: bytes of a row and of the factors in fp16."""

    rows: int
    sides: tuple[int, int]
    slices: int
    warps: int
    batched: bool

    @property
    def values(self) -> int:
        """Of a padded row, all of which registers hold."""
        return self.slices * self.sides[0] * self.sides[1]

    @property
    def shared(self) -> int:
        return 2 * (self.values + (self.slices if self.batched else 1) * sum(s * s for s in self.sides))


def kronecker_limits(target: Target, tile: KroneckerTile) -> tuple[int, int]:
    """The longest side of a slice, and the most values of a padded row that registers hold: 32 a thread in 16
    warps. RDNA spills above a quarter of that, RDNA 3 with sides of 64, CDNA with 128, a warp for each slice
    above 64 a thread."""
    values, side = target.card.row_values, target.card.side
    return side, min(values, 2048 * tile.slices) if tile.batched else values


def kronecker_tile(target: Target, p1: int, p2: int, slices: int, per_slice: bool) -> KroneckerTile:
    """Of `quant_activation.kronecker`, whether or not it fits the card.

    Four tokens a program: at M = 4608 that is two rounds of an RTX 4090, and the factors, 6 kB for 24 x 32,
    are read once in 25 kB of x.
    """
    tile = KroneckerTile(
        3 if target.interpreted else 4,
        (_padded(p1), _padded(p2)),
        _power(slices),
        1,
        per_slice and slices > 1,
    )
    warps = min(max(tile.values // target.card.warp_values, 1), 16)
    if tile.batched:  # more warps than slices would do the same work twice
        warps = min(warps, tile.slices)
    elif target.card.tcgen05 and warps in (4, 8):  # Triton 3.6 cannot transpose its result
        warps = 16
    elif target.card.wgmma and max(tile.sides) == 128:  # 16 warps spill
        warps = min(warps, 8)
    return replace(tile, warps=warps)


def _padded(side: int) -> int:
    return max(16, _power(side))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def low_rank_limit(target: Target, rotation: int) -> int:
    """Columns of the low rank that fit beside the codes in the quantizer. More of them take a product of
    their own.

    None on Turing, whose 16-bit tensor cores Triton does not use, nor on RDNA beside tiles that are mixed
    (hundreds of spills).
    """
    card = target.card
    return 64 if card.branch and rotation <= card.branch_rotation else 0


def candidates(target: Target, problem: Problem) -> list[Tile]:
    """Tiles worth timing, the default first. Every one of them is compiled by the tests for its card."""
    tiles = _family(target, problem)
    # Few tokens: lower tiles, which other tokens' rows would not fill.
    if problem.tokens <= 64:
        tiles = [replace(t, bm=min(t.bm, 64)) for t in tiles]
    if problem.planes == 4:  # four tiles of x a step: with 64 bytes registers spill
        tiles = [replace(t, bk=min(t.bk, 32)) for t in tiles]
    if problem.scales == GROUP:
        tiles = [replace(t, bk=problem.block) for t in tiles]
    elif problem.scales == SLICE:
        tiles = [replace(t, bk=_divisor(problem.block, t.bk)) for t in tiles]
    out = []
    for tile in _ampere(target, problem) + tiles + _gluon(target, problem):
        if tile not in out and shared_bytes(tile, problem) <= target.shared_bytes:
            out.append(tile)
    return out


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """What the pipelined loads of the main loop take at most (mma.sync needs a stage less than wgmma)."""
    codes = tile.stages * tile.bk * (tile.bm * max(problem.planes, 1) + tile.bn)
    if tile.gluon and problem.scales == GROUP:  # scales of up to 4 bytes come with the codes
        codes += tile.stages * tile.bk // problem.block * 4 * (tile.bm + tile.bn)
    return codes


def _divisor(block: int, limit: int) -> int:
    return min(block & -block, limit)


def _family(target: Target, problem: Problem) -> list[Tile]:
    kind = problem.scales
    if target.backend == "hip":
        if target.card.waves_of_64:
            return [Tile(64, 128, 64, 4, 2, rank_block=16), Tile(64, 64, 64, 4, 2)]
        return [Tile(64, 64, 64, 8 if kind else 4, 2, rank_block=16), Tile(32, 64, 64, 4, 2, rank_block=16)]
    if target.card.int4 == M8N8K32:  # 4 warps of 64 x 64 or 32 x 64; a step is always a group of 64
        return [Tile(128, 128, 32, 4, 1), Tile(64, 128, 32, 4, 1)][kind != 0 :]
    # Registers: from Triton 3.9 on a tile of 128 x 128 spills where sums and their rescaled total are both
    # kept.
    roomy = target.triton is None or target.triton < (3, 9)
    if target.card.wgmma:
        if problem.planes == 1:
            return [Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 3)][kind != 0 :]
        if problem.planes == 4:  # 256 x 128 spills
            return [Tile(128, 256, 32, 8, 3), Tile(128, 128, 32, 4, 4)][kind != 0 :]
        if kind:
            return [Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4)]
        return [Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(256, 128, 64, 8, 4)]
    if target.card.int4 and not problem.planes:
        small = [Tile(64, 128, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)]
        if kind == GROUP:  # blocks of 4 warps are not all in one phase: 67 and 53 % modelled, 8 warps 41 %
            four = [Tile(128, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)]
            return [*four, Tile(128, 128, 64, 8, 4), *small]
        if kind:
            return [Tile(128, 128, 64, 8, 4), *small] if roomy else small
        large = [Tile(128, 256, 64, 8, 3)] if roomy else []
        return [
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 4, 3),
            Tile(128, 128, 128, 8, 3),
            *large,
            small[0],
        ]
    if target.card.tcgen05 and kind:
        return [Tile(64, 128, 32, 8, 3, rank_block=16), Tile(64, 64, 64, 4, 3)]
    # int8 by mma.sync: sm_80 to sm_89 with 8-bit or 2-bit sides, sm_100, sm_120, and cards not known yet.
    # With 32 columns of the low rank a step, a block less fits a multiprocessor.
    first = [Tile(128, 64, 32, 4, 3, rank_block=16)] if kind == GROUP else []
    return [
        *first,
        Tile(64, 128, 64, 4, 3, rank_block=16),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 128, 32, 4, 3),
        Tile(64, 64, 64, 4, 3),
    ]


# By whether codes are packed, and scales: tiles of `quant_linear.ampere`, the best modelled first.
_AMPERE = {
    (True, GROUP): [
        Tile(128, 128, 128, 8, 2, rank_block=16, gluon=True),
        Tile(128, 64, 64, 4, 2, rank_block=16, gluon=True),
    ],
    (True, CHANNEL): [
        Tile(128, 128, 64, 4, 3, rank_block=16, gluon=True),
        Tile(128, 128, 64, 8, 4, rank_block=16, gluon=True),
    ],
    (False, CHANNEL): [
        Tile(128, 128, 64, 4, 3, rank_block=16, gluon=True),
        Tile(128, 128, 64, 8, 4, rank_block=16, gluon=True),
    ],
}


def _ampere(target: Target, problem: Problem) -> list[Tile]:
    """Its copies want whole tiles of bytes in a row, and 16-byte rows of scales. Few tokens wait for the
    weights."""
    known = target.card.int4 == MMA and target.triton is not None and MIN_INT4 <= target.triton < (3, 9)
    if not known or problem.tokens <= 64 or problem.channels % 16 or problem.planes > 1:
        return []
    tiles = _AMPERE.get((problem.planes == 0, problem.scales), [])
    return [t for t in tiles if problem.row_bytes % t.bk == 0]


# By planes and scales: tiles of Hopper's kernel in Gluon, behind Triton's, so that they are taken only where
# they were timed.
_GLUON = {
    (2, CHANNEL): [
        Tile(128, 256, 64, 8, 6, gluon=True),
        Tile(256, 128, 64, 8, 5, gluon=True),
        Tile(128, 128, 64, 4, 4, gluon=True),
    ],
    (2, SLICE): [Tile(128, 128, 64, 8, 5, rank_block=64, gluon=True)],
    (1, CHANNEL): [Tile(128, 256, 128, 8, 4, gluon=True), Tile(128, 128, 128, 4, 3, gluon=True)],
    (1, SLICE): [Tile(128, 128, 128, 8, 5, rank_block=64, gluon=True)],
}


def _gluon(target: Target, problem: Problem) -> list[Tile]:
    """Its copies want rows of whole 16 bytes. Few tokens wait for the weights, whatever multiplies them."""
    known = target.card.wgmma and target.triton is not None and target.triton >= MIN_INT4
    if not known or problem.tokens <= 64 or problem.row_bytes % 16:
        return []
    tiles = _GLUON.get((problem.planes, problem.scales), [])
    return [t for t in tiles if problem.scales != SLICE or problem.block % t.bk == 0]


def gemm_tile(target: Target, problem: Problem) -> Tile:
    """The measured tile of this card where there is one, else the shipped default."""
    if target.interpreted:
        return interpreter_tile(problem)
    measured = cache_for(target).get(problem.key)
    known = candidates(target, problem)
    return measured if measured in known else known[0]


def interpreter_tile(problem: Problem) -> Tile:
    """Small, so that tests on small shapes cross tile borders."""
    bk = (
        problem.block
        if problem.scales == GROUP
        else _divisor(problem.block, 64)
        if problem.scales == SLICE
        else 32
    )
    return Tile(32, 32, bk, 4, 1, group_m=2, rank_block=16)


changes = 0  # how often measured tiles have changed in this process


class TileCache:
    """Measured tiles of one card and Triton version: {problem key: Tile} in a JSON file. A file that cannot
    be read is ignored with a warning and replaced by the next save (`nibble bench --all`)."""

    def __init__(self, path: Path):
        self.path, self.tiles = path, {}
        try:
            raw = json.loads(path.read_text())
            named = lambda values: Tile(**dict(zip(raw["fields"], map(int, values), strict=True)))
            self.tiles = {key: named(values) for key, values in raw["tiles"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as e:
            warnings.warn(
                f"{path}: not a table of tiles ({type(e).__name__}: {e}); the shipped defaults are used",
                stacklevel=2,
            )

    def get(self, key: str) -> Tile | None:
        return self.tiles.get(key)

    def put(self, measured: dict[str, Tile | None]):
        """Takes these tiles from now on; None: the default again. The file is not touched."""
        global changes
        changes += 1  # launches keep what they have looked up under this number
        self.tiles = {key: tile for key, tile in (self.tiles | measured).items() if tile is not None}


def cache_path(target: Target) -> Path:
    version = ".".join(map(str, target.triton or ()))
    name = re.sub(r"\W+", "-", f"{target.name or target}-{target.arch}-triton{version}".lower())
    return Path(platformdirs.user_cache_dir("comfyui_nibble", appauthor=False)) / f"tiles-{name}.json"


@lru_cache(maxsize=8)
def cache_for(target: Target) -> TileCache:
    return TileCache(cache_path(target))
