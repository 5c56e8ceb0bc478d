"""What adapters add to a quantized layer, beside its packed weight: W' = gain * W + low rank + Kronecker
products + dense.

Nothing here writes into the packed bytes. Each term is kept in the cheapest form that is exact; see
`kronecker_or_low_rank`.
"""

from dataclasses import dataclass, field, replace

import torch

from ...kernels.lora import with_lora
from ...kernels.operator.codes import NVFP4
from ...kernels.operator.transforms import kronecker
from .assemble import shift_correction
from .linear import QuantizedLayer


@dataclass(frozen=True)
class LowRank:
    """up @ down on the out-channels from `first` on. down (r, K), up (n, r)."""

    down: torch.Tensor
    up: torch.Tensor
    first: int = 0


@dataclass(frozen=True)
class Kronecker:
    """left (a, b) (x) right (c, d) on the out-channels from `first` on: a c of them, K = b d."""

    left: torch.Tensor
    right: torch.Tensor
    first: int = 0

    @property
    def rows(self) -> int:
        return self.left.shape[0] * self.right.shape[0]

    def __call__(self, x):
        """x (..., K) -> (..., a c) without the (a c, K) matrix."""
        return kronecker(x, self.left.mT, self.right.mT)


@dataclass
class Side:
    """The terms beside a layer of `out_features` x `in_features`, all fp32 or in the adapters' own dtype.

    gain (N,) multiplies the quantized weight by rows, its own low-rank branch included; None for ones. dense
    (N, K) or None.
    """

    out_features: int
    in_features: int
    gain: torch.Tensor | None = None
    low_rank: list[LowRank] = field(default_factory=list)
    kronecker: list[Kronecker] = field(default_factory=list)
    dense: torch.Tensor | None = None

    @property
    def device(self) -> torch.device | None:
        """Where the terms are; None without any."""
        held = [self.gain, self.dense, *(t.up for t in self.low_rank), *(t.left for t in self.kronecker)]
        return next((t.device for t in held if t is not None), None)

    def scale_rows(self, factor: torch.Tensor, first: int = 0):
        """Multiplies W' by factor (n,), fp32, on the out-channels from `first` on: the base weight and every
        term so far."""
        whole = torch.ones(self.out_features, device=factor.device)
        whole[first : first + len(factor)] = factor
        self.gain = whole if self.gain is None else self.gain * whole
        self.low_rank = [
            replace(t, up=t.up.float() * whole[t.first : t.first + len(t.up), None]) for t in self.low_rank
        ]
        if self.dense is not None:
            self.dense = self.dense * whole[:, None]
        met = lambda t: t.first < first + len(factor) and first < t.first + t.rows
        for term in filter(met, self.kronecker):  # rows scaled apart are no Kronecker product any more
            matrix = torch.kron(term.left, term.right)
            self.add_dense(matrix * whole[term.first : term.first + len(matrix), None], term.first)
        self.kronecker = [t for t in self.kronecker if not met(t)]

    def scale(
        self,
        value: float,
        rows: int,
        first: int,
        device,
    ):
        """Multiplies W' by one number on `rows` out-channels from `first` on. Kronecker products that lie in
        there stay such."""
        inside = lambda t: first <= t.first and t.first + t.rows <= first + rows
        scaled = [replace(t, left=t.left * value) for t in self.kronecker if inside(t)]
        self.kronecker = [t for t in self.kronecker if not inside(t)]
        self.scale_rows(torch.full((rows,), value, device=device), first)
        self.kronecker += scaled

    def add_dense(self, matrix: torch.Tensor, first: int = 0, column: int = 0):
        """Adds matrix (n, k) at row `first` and column `column`."""
        if self.dense is None:
            self.dense = torch.zeros(self.out_features, self.in_features, device=matrix.device)
        self.dense[first : first + matrix.shape[0], column : column + matrix.shape[1]] += matrix

    def weight(self, base: torch.Tensor) -> torch.Tensor:
        """W' (N, K), fp32, for the dequantized base weight (N, K)."""
        out = base.float() * self.gain[:, None] if self.gain is not None else base.float().clone()
        for t in self.low_rank:
            out[t.first : t.first + len(t.up)].addmm_(t.up.float(), t.down.float())
        for term in self.kronecker:
            matrix = torch.kron(term.left.float(), term.right.float())
            out[term.first : term.first + len(matrix)] += matrix
        return out if self.dense is None else out.add_(self.dense)

    def nbytes(self, layer: QuantizedLayer, dtype: torch.dtype) -> int:
        """What the side adds to the bytes of a layer when it is attached in `dtype`; the replaced tensors are
        taken off."""
        _, changed = self.merged(layer, dtype)
        added = sum(
            t.nbytes - (layer.tensors[k].nbytes if k in layer.tensors else 0) for k, t in changed.items()
        )
        loose = sum(t.left.numel() + t.right.numel() for t in self.kronecker)
        return added + dtype.itemsize * (loose + (self.dense.numel() if self.dense is not None else 0))

    def describe(self) -> str:
        """E.g. "rank 48" or "gain, rank 16, dense 3072 x 3072"."""
        rank = sum(t.down.shape[0] for t in self.low_rank)
        words = ["gain"] * (self.gain is not None) + [f"rank {rank}"] * bool(rank)
        words += [f"{len(self.kronecker)} Kronecker"] * bool(self.kronecker)
        words += [f"dense {self.out_features} x {self.in_features}"] * (self.dense is not None)
        return ", ".join(words)

    def merged(self, layer: QuantizedLayer, dtype: torch.dtype):
        """(spec, {name: tensor}) of the layer with gain and low rank in its own tensors; the packed weight is
        not among them.

        proj_* in `dtype`; where there is a gain, weight_scale in fp32, as 16 bits would round it a second
        time, or outer_scale on the nvfp4 grid.
        "bias_offset" (N,), fp32, where activations are shifted: the bias holds the correction for the weight
        without the gain.
        """
        changed = {}
        if self.gain is not None:
            of_rows = "outer_scale" if layer.spec.grid == NVFP4 else "weight_scale"
            changed[of_rows] = layer.tensors[of_rows].float() * self.gain
            if layer.spec.rank:
                changed["proj_up"] = layer.tensors["proj_up"].float() * self.gain[:, None]
            if (correction := bias_correction(layer)) is not None:
                changed["bias_offset"] = (1 - self.gain) * correction
        spec, tensors = with_lora(
            layer.spec, layer.tensors | changed, [(t.down, t.up, t.first) for t in self.low_rank], dtype
        )
        for name in (
            ("proj_down", "proj_up") if spec.rank and (self.low_rank or self.gain is not None) else ()
        ):
            changed[name] = tensors[name].to(dtype)
        return spec, changed


def bias_correction(layer: QuantizedLayer) -> torch.Tensor | None:
    """What the bias of a layer with shifted activations holds beside the model's own: minus this, (N,) fp32;
    None without a shift."""
    found = [
        shift_correction(part.weight.unpack(packed), scales.T, part, smooth)
        for part, packed, scales, smooth in layer.spec.split(layer.tensors)
        if part.activation is not None and part.activation.shift
    ]
    return torch.stack(found).sum(0) if found else None


def kronecker_or_low_rank(left, right, right_factors, first=0) -> LowRank | Kronecker:
    """left (a, b) (x) right (c, d) in the form with fewer multiplications a token.

    right_factors: (c, r) and (r, d) whose product is `right`, or None. The rank of the whole is then min(a,
    b) r, and a low-rank branch rides in the kernel of the layer; a full `right` would need min(a, b) min(c,
    d), so it is kept as it is.
    """
    (a, b), (c, d) = left.shape, right.shape
    if right_factors is not None:
        outer, inner = right_factors
        rank = min(a, b) * inner.shape[0]
        if rank * (a * c + b * d) <= b * c * d + a * b * c:
            eye = torch.eye(min(a, b), dtype=left.dtype, device=left.device)
            ups, downs = (eye, left) if a <= b else (left, eye)
            return LowRank(torch.kron(downs, inner), torch.kron(ups, outer), first)
    return Kronecker(left, right, first)


def hadamard_low_rank(a: tuple, b: tuple):
    """(up, down) of the elementwise product of two low-rank matrices a = (n, r) (r, k) and b = (n, s) (s, k),
    of rank r s."""
    up = (a[0][:, :, None] * b[0][:, None, :]).flatten(1)
    down = (a[1][:, None, :] * b[1][None, :, :]).flatten(0, 1)
    return up, down
