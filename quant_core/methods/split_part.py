"""A part of a SplitQuant layer: smoothing, factors, clip and rounding, each judged on held-out tokens."""

from dataclasses import replace
from itertools import pairwise

import torch

from ...kernels.operator.quantizers import absmax_scale, dequantize, quantize
from ...kernels.operator.spec import ActivationSpec, PartSpec, WeightSpec
from ...kernels.operator.transforms import fold_weight, kronecker, transform_activation, unfold_weight
from ..layer.assemble import FittedPart, column_absmax, folded_t, round_part, smoothing
from ..layer.chunks import row_chunks
from . import balance, gptq
from .factors import balanced, hadamard_factor, slice_width, start_factor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
DAMPS = (0.003, 0.03, 0.3)  # of the second moments that affine factors are made from


class SplitPart:
    """In-channels `index` (w,) of a layer, fitted, in that order, which is the one of all tensors in here.

    Inside there is one scale each `group` channels, whatever the granularity: the whole part, a slice or 64.
    chosen: {choice: value}. error: energy of its output's error on the fit tokens.
    """

    def __init__(
        self,
        problem,
        index,
        config,
        bits=4,
    ):
        self.config, self.index, self.bits, self.dtype = config, index, bits, problem.dtype
        straight = int(index[-1] - index[0]) == len(index) - 1 and bool((index.diff() == 1).all())
        columns = slice(int(index[0]), int(index[-1]) + 1) if straight else index  # a view where there is one
        self.weight = problem.weight[:, columns]
        width = len(index)
        room = max(1, width // config.least)
        self.slices = (
            config.slices if config.slices <= room else max(s for s in range(1, room + 1) if width % s == 0)
        )
        self.step = slice_width(width, self.slices)
        self.sizes = balanced(self.step) if config.transform != "identity" else ()
        # 47 x 16, not 16 x 47: kernels pack two codes of a row into a byte.
        if self.sizes and self.sizes[1] % 2:
            self.sizes = self.sizes[::-1]
        self.group = {"token": width, "slice": self.step, "group": 64}[config.scales]
        self.absmax = self.x = None
        self.hessians = {}
        if (statistics := problem.statistics) is not None:
            self.absmax = statistics.absmax[columns].to(self.weight.device)
            self.hessians = {
                b: h for b, h in statistics.hessians.items() if ((index >= b[0]) & (index < b[1])).any()
            }
        if (tokens := problem.tokens("select")) is not None:
            self.x = tokens[: config.tokens, columns]
        self.best, self.chosen = self._fitted()
        self.error = None if self.x is None else self._error(self.best)

    def _fitted(self):
        factors = self._start()
        if self.x is None:
            return self._finished(None, factors, 1.0), {"data": "none"}
        smooth, label = min(self._smooths(), key=lambda s: self._rough_error(s[0], factors))
        clip, chosen = 1.0, {"smooth": label}
        if self.config.transform == "affine":
            offered = [(factors, "orthogonal"), *self._affine(smooth, factors)]
            factors, chosen["transform"] = min(offered, key=lambda f: self._rough_error(smooth, f[0]))
        if self.config.clip:
            clip = min(CLIPS, key=lambda c: self._rough_error(smooth, factors, c))
            chosen["clip"] = f"{clip:g}"
        best = self._finished(smooth, factors, clip)
        if (
            self.config.gptq
            and (other := self._gptq(best)) is not None
            and self._error(other) < self._error(best)
        ):
            best, chosen["rounding"] = other, "gptq"
        return best, chosen

    def _start(self):
        if not self.sizes:
            return None
        pairs = self.slices if self.config.per_slice else 1
        if self.config.transform == "hadamard":
            made = [hadamard_factor(size) for size in self.sizes]
        else:
            made = [start_factor(size, self.config.seed + i) for i, size in enumerate(self.sizes)]
        return self._stored(tuple(f.expand(pairs, -1, -1).to(self.weight.device) for f in made))

    def _stored(self, factors):
        """As a file will hold them, so that W is folded with the inverse of just that."""
        return tuple(f.to(self.dtype).float() for f in factors)

    def _affine(self, smooth, start):
        """Yields (factors, label): M^1/2 Q with Q the start, for M of `balance` at each of the DAMPS; nothing
        without second moments."""
        if not self.hessians:
            return
        pairs = []
        for i in range(self.slices):
            at = slice(i * self.step, (i + 1) * self.step)
            s, scale = self._moments(at), smooth[at]
            g = torch.zeros_like(s)
            for rows in row_chunks(len(self.weight), self.step, device=self.weight.device):
                chunk = self.weight[rows, at].float() * scale
                g.addmm_(chunk.T, chunk)
            pairs.append((s / scale / scale[:, None], g))
        if not self.config.per_slice:
            pairs = [(sum(s for s, _ in pairs), sum(g for _, g in pairs))]
        for damp in DAMPS:
            found = zip(*(balance.metric(s, g, self.sizes, damp) for s, g in pairs), strict=True)
            factors = tuple(
                (balance.sqrtm(torch.stack(m)) @ q.double()).float()
                for m, q in zip(found, start, strict=True)
            )
            yield self._stored(factors), f"affine {damp:g}"

    def _moments(self, at):
        """Second moments of the channels at `at`, (w, w) fp32; 0 between channels of different blocks of the
        calibration."""
        index = self.index[at]
        out = torch.zeros(len(index), len(index), device=self.weight.device)
        for (start, stop), h in self.hessians.items():
            here = ((index >= start) & (index < stop)).nonzero().flatten()
            if len(here):
                local, place = (index[here] - start).to(h.device), here.to(out.device)
                out[place[:, None], place] = h[local[:, None], local].to(out.device, torch.float32)
        return out

    def _smooths(self):
        w = column_absmax(self.weight)
        for alpha, beta in self.config.smooth:
            yield (
                smoothing(
                    self.absmax,
                    w,
                    alpha,
                    beta,
                    self.dtype,
                ),
                f"absmax {alpha:g}/{beta:g}",
            )

    def _seen(self, smooth, factors, clip):
        """The fit tokens as the product sees them: transformed, rounded, and real values again."""
        tx = transform_activation(self.x, smooth, 0, factors=factors)
        return self._rounded(tx, clip)

    def _rounded(self, values, clip=1.0):
        scale = absmax_scale(
            values,
            self.bits,
            "group",
            self.group,
            clip=clip,
        )
        return dequantize(
            quantize(
                values,
                scale,
                self.bits,
                "group",
                self.group,
            ),
            scale,
            "group",
            self.group,
        )

    def _rough_error(self, smooth, factors, clip=1.0) -> float:
        """Of the output on the fit tokens, on every n-th out-channel."""
        weight = self.weight[:: max(1, len(self.weight) // self.config.rows)].float()
        rounded = self._rounded(fold_weight(weight, smooth, 0, factors))
        return float(
            (self.x @ weight.T - self._seen(smooth, factors, clip) @ rounded.T).double().square().sum()
        )

    def _finished(self, smooth, factors, clip):
        spec = PartSpec(
            0,
            len(self.index),
            WeightSpec(self.bits, "group", self.group),
            ActivationSpec(self.bits, "group", self.group, clip=clip),
            smooth=smooth is not None,
            kronecker=self.sizes,
            per_slice=self.config.per_slice and bool(self.sizes),
        )
        dtype = self.dtype if self.config.scales == "group" else torch.float32
        codes, scales = round_part(
            self.weight,
            spec,
            smooth,
            dtype,
            factors=factors,
        )
        return FittedPart(spec, codes, scales, smooth, factors=factors)

    def _gptq(self, nearest):
        """The same part rounded by GPTQ at the same scales, in ranges of whole slices as wide as a block of
        the calibration; None without second moments."""
        if not self.hessians:
            return None
        smooth, factors, upper, width = nearest.smooth, nearest.factors, {}, len(self.index)
        step = self.step if self.sizes else 64
        most = max(1, max(b - a for a, b in self.hessians) // step)
        count = -(-(width // step) // most)
        edges = [width // step * i // count * step for i in range(count)] + [width]
        for a, b in pairwise(edges):
            pick = slice(a // step, b // step) if self.config.per_slice else slice(None)
            local = None if factors is None else tuple(f[pick] for f in factors)
            here = None if smooth is None else smooth[a:b]
            h = gptq.transformed_moments(self._moments(slice(a, b)), here, factors=local)
            upper[a, b] = gptq.upper_factor(h, self.config.damp)
        rest = folded_t(self.weight, nearest.spec, smooth, factors=factors)
        scales = nearest.scales.T.contiguous()
        codes, _ = gptq.quantize(
            rest,
            upper,
            self.bits,
            self.group,
            scales.dtype,
            scales=scales,
        )
        return replace(nearest, codes=codes.T.contiguous())

    def _weight(self, part, rows):
        """Rows of the rounded weight, of the transformed input."""
        return dequantize(part.codes[rows], part.scales[rows].float(), "group", self.group)

    def _error(self, part) -> float:
        """Energy of the output's error on the fit tokens, with the codes as they are."""
        tx, error = self._seen(part.smooth, part.factors, part.spec.activation.clip), 0.0
        for rows in row_chunks(*self.weight.shape, device=self.weight.device):
            error += (
                (self.x @ self.weight[rows].float().T - tx @ self._weight(part, rows).T)
                .double()
                .square()
                .sum()
                .item()
            )
        return error

    def shares(self) -> torch.Tensor:
        """Of each channel in the ranges that scales are made of: the larger of its shares of absmax(x / s)
        and of absmax(W s), (w,)."""
        smooth = self.best.smooth
        x, w = self.absmax / smooth, column_absmax(self.weight) * smooth
        return torch.maximum(x / x.sum(), w / w.sum())

    def blame(self) -> torch.Tensor:
        """Of each channel in the error of the output on the fit tokens, were the errors of channels
        independent, (w,)."""
        smooth, factors = self.best.smooth, self.best.factors
        seen = self._seen(smooth, factors, self.best.spec.activation.clip)
        back = (
            seen
            if factors is None
            else kronecker(seen, *(torch.linalg.inv(f.double()).float() for f in factors))
        )
        x_error, x_energy = (self.x - back * smooth).square().sum(0), self.x.square().sum(0)
        out = torch.zeros_like(x_error)
        for rows in row_chunks(*self.weight.shape, device=self.weight.device):
            weight = self.weight[rows].float()
            rest = weight - unfold_weight(self._weight(self.best, rows), smooth, 0, factors)
            out += x_error * weight.square().sum(0) + x_energy * rest.square().sum(0)
        return out

    def stored(self, start: int) -> list[FittedPart]:
        """What `assemble` takes, the channels from place `start` on: one part, or one for each slice."""
        spec, best, width = self.best.spec, self.best, len(self.index)
        if self.config.scales == "group":
            return [replace(best, spec=replace(spec, start=start, stop=start + width))]
        each = replace(
            spec,
            weight=WeightSpec(self.bits, "channel"),
            activation=ActivationSpec(self.bits, "token", clip=spec.activation.clip),
            per_slice=spec.per_slice and self.group == width,
        )
        made = []
        for i, a in enumerate(range(0, width, self.group)):
            at, pick = (
                slice(a, a + self.group),
                slice(i, i + 1) if spec.per_slice and not each.per_slice else slice(None),
            )
            here = replace(each, start=start + a, stop=start + a + self.group)
            smooth = None if best.smooth is None else best.smooth[at]
            factors = None if best.factors is None else (best.factors[0][pick], best.factors[1][pick])
            scales = best.scales[:, i : i + 1]
            made.append(
                FittedPart(
                    here,
                    best.codes[:, at],
                    scales,
                    smooth,
                    factors=factors,
                )
            )
        return made
