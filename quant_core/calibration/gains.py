"""How much of the noise at each layer's output arrives at the end of a run: the weights of `allocate`,
measured on the model itself."""

import glob
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..store.own_json import field
from ..store.progress import Progress, silent
from ..store.table import Table
from ..store.workers import HERE, Workers
from .file import Calibration, CalibrationError
from .trajectory import Trajectory

RATIO = 1e-3  # noise to signal, 30 dB: about that of 4 bits
SAMPLES, STEPS = 2, 5  # recorded samplings, and the calls of each


def measure(
    run: Callable[[], torch.Tensor],
    modules: Mapping[str, Iterable[torch.nn.Module]],
    ratio: float = RATIO,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, float]:
    """{layer: energy of the change of run()'s result, at the same noise-to-signal ratio of each layer's
    output}, their mean scaled to 1.

    run() -> any tensor, the same each time: final latents of a few short samplings, or what `replayed` gives.
    modules: {layer: the modules that hold its rows}. ratio: of the Gaussian noise that is added to each
    output of one layer at a time.

    In the small FLUX they span 0.01 (text attention's projection) to 5.6 (image qkv). RobuQ's activation bits
    at rank 32, 48 pictures compared one by one: at 2.5 on average gains of `replayed` bring 2.9 dB over noise
    alone (2.0 to 4.0, 45 of 48). Gains of samplings came out alike by the PSNR of all pictures as one: two
    calibrations, 27.9 and 28.3 dB, `replayed` 28.3 and 28.3, noise alone 26.0 and 27.4.
    """
    want = run()
    return _mean_1(
        {
            layer: _energy(run, want, held, ratio, seed)
            for layer, held in progress(modules.items(), len(modules))
        }
    )


def chains(trajectory: Trajectory, samples: int = SAMPLES, steps: int = STEPS) -> list[list[int]]:
    """Indices of up to `steps` calls, evenly spread, of each of `samples` samples, those with most calls
    first."""
    of: dict[int, list[int]] = {}
    for i, call in enumerate(trajectory.calls):
        of.setdefault(call.sample, []).append(i)
    longest = sorted(of.values(), key=lambda chain: -len(chain))[:samples]
    return [
        [c[round(k * (len(c) - 1) / max(1, n - 1))] for k in range(n)]
        for c in longest
        for n in [min(steps, len(c))]
    ]


def replayed(
    network: torch.nn.Module, trajectory: Trajectory, chains: list[list[int]], device="cpu"
) -> Callable[[], torch.Tensor]:
    """A `run` for `measure`: where samplings end that go through recorded calls, flat, fp32.

    From one call to the next the state goes as x' = a x + b v + c, as Euler's and DDIM's do for any step: a
    and b by least squares from the recorded states x, x' and the prediction v, so that a change of v moves
    what the next call sees. In the small FLUX such gains of 2 samples of 5 steps correlate with those of
    samplings by 0.89 and 0.94 (mild and hard outliers, logarithms), and those of single calls by 0.71 and
    0.90. Under guidance both halves of a batch move apart, which the sampler would not let them. Raises
    CalibrationError where state and prediction have nothing to do with each other.
    """

    call = partial(_called, network, trajectory, device)
    plans = [_steps(call, chain) for chain in chains]

    def run():
        ends = []
        for steps in plans:
            moved = None
            for i, x, v, part, a, b in steps:
                now = x.clone()
                if moved is not None:
                    now[part] += moved
                found = call(i, now)[1]
                moved = a * (now - x)[part] + b * (found - v)[part]
            ends.append(moved.flatten())
        return torch.cat(ends)

    return run


@torch.no_grad()
def _called(network, trajectory, device, i, x=None):
    """(the state, as recorded if None, the prediction) of a call, fp32."""
    args, kwargs = trajectory.arguments(i, device)
    place, key = (args, 0) if args else (kwargs, "hidden_states")
    if x is not None:
        place[key] = x.to(place[key].dtype)
    x = place[key].float()
    out = network(*args, **kwargs)
    return x, (out if isinstance(out, torch.Tensor) else out[0]).float()


def _steps(call, chain):
    """Of each call its number, state and prediction, the part that the two share, a and b of the step to the
    next."""
    seen, out = [call(i) for i in chain], []
    a, b = 0.0, 1.0  # of a lone call: its prediction
    for k, (i, (x, v)) in enumerate(zip(chain, seen, strict=True)):
        if x.ndim != v.ndim:
            raise CalibrationError(
                f"recorded inputs of the network are {tuple(x.shape)}, its predictions {tuple(v.shape)}"
            )
        # Channels of a learned variance, of a mask or of a reference have no part in it.
        part = tuple(slice(min(n, m)) for n, m in zip(x.shape, v.shape, strict=True))
        if k + 1 < len(seen):
            pair = torch.stack([x[part].flatten(), v[part].flatten()], 1).double()
            wanted = seen[k + 1][0][part].flatten().double()[:, None]
            a, b = torch.linalg.lstsq(pair, wanted).solution.flatten().tolist()
        out.append((i, x, v, part, a, b))
    return out


def of_calibration(
    calibration: Calibration,
    names: list[str],
    network: Callable[[], tuple[torch.nn.Module, Mapping[str, Iterable[torch.nn.Module]]]],
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    samples: int = SAMPLES,
    workers: Workers = HERE,
    memory: int = 0,
) -> dict[str, float]:
    """The gains of the layers `names` on recorded samplings of a calibration, kept in
    `<calibration>.gains.json` after each layer.

    network() -> (the network, {layer: its modules}), called only where something is left to measure, once in
    each process of `workers`; memory: bytes that it takes. A table of another calibration or number of
    samples is replaced. Raises CalibrationError for a calibration without
    recorded calls, or with those of another network, ValueError for a damaged table.
    """
    trajectory = calibration.trajectory()
    if not trajectory:
        raise CalibrationError(
            f"calibration {calibration.path}: holds no recorded inputs of the network to measure gains on, "
            "as those made before version 0.4 "
            "or merged. Calibrate again, or allocate without gains."
        )
    settings = {"calibration": calibration.hash, "samples": samples, "steps": STEPS, "ratio": RATIO}
    table = Table(Path(f"{calibration.path}.gains.json"), settings, "gains")
    known = dict(table.parsed(lambda r: (field(r, "name", str), float(field(r, "energy", (int, float))))))
    _require_finite(calibration, known)
    if left := [name for name in names if name not in known]:
        unit = OneLayer(calibration, network, chains(trajectory, samples), device)

        def kept():  # before an interrupt can come
            for name, energy in workers.map(unit, left, "gain of {}".format, lambda name: memory):
                _require_finite(calibration, {name: energy})
                table.add({"name": name, "energy": energy})
                yield name, energy

        known |= dict(progress(kept(), len(left)))
    if not any(known[name] for name in names):
        raise CalibrationError(
            f"calibration {calibration.path}: no layer's noise arrives at the end of its recorded samplings. "
            "Allocate without gains."
        )
    return _mean_1({name: known[name] for name in names})


class OneLayer:
    """(a layer's name, the energy of what its noise changes at the ends of recorded samplings). Makes its
    network once, where it is first called."""

    def __init__(self, calibration: Calibration, network: Callable, indices: list[list[int]], device):
        self._calibration, self._network = calibration, network
        self._indices, self._device = indices, device
        self._made: tuple | None = None

    def __call__(self, name: str) -> tuple[str, float]:
        if self._made is None:
            trajectory = self._calibration.trajectory()
            assert trajectory is not None
            model, modules = self._network()
            _require_fit(self._calibration, trajectory, self._indices[0][0], model)
            run = replayed(model, trajectory, self._indices, self._device)
            self._made = run, modules, run()
        run, modules, want = self._made
        return name, _energy(run, want, modules[name], RATIO, 0)


def _require_finite(calibration, energies):
    for name, energy in energies.items():
        if not 0 <= energy < math.inf:
            raise CalibrationError(
                f"calibration {calibration.path}: gain of layer {name}: expected a finite energy, found "
                f"{energy}. The model, or what the calibration recorded of it, holds NaN or Inf; a damaged "
                ".gains.json is to be deleted."
            )


def tables_of(calibration: Calibration) -> list[Path]:
    """The gains that are kept beside a calibration: those of other settings have a part of a hash in their
    names."""
    path = calibration.path
    return [
        path.with_name(f"{path.name}.gains.json"),
        *path.parent.glob(f"{glob.escape(path.name)}.gains.*.json"),
    ]


def _energy(run, want, modules, ratio, seed) -> float:
    with _noisy(modules, ratio, seed):
        found = run()
    return float((found - want).double().square().sum())


def _mean_1(energies):
    mean = sum(energies.values()) / len(energies)
    return {layer: energy / mean for layer, energy in energies.items()}


def _require_fit(calibration, trajectory, index, network):
    """The recorded arguments of ComfyUI's models and of diffusers' have different names."""
    args, kwargs = trajectory.arguments(index)
    try:
        inspect.signature(network.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CalibrationError(
            f"calibration {calibration.path}: its recorded inputs do not fit {type(network).__name__} "
            f"({error}). Calibrations of the node are "
            "for Nibble Allocate Bits, those of `nibble calibrate` for the command."
        ) from error


@contextmanager
def _noisy(modules, ratio, seed) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers whatever the device

    def add(module, args, y):
        if not isinstance(y, torch.Tensor):  # both streams of a block
            return tuple(add(module, args, t) for t in y)
        noise = torch.randn(y.shape, generator=generator).to(y)
        return y + noise * (ratio * y.float().square().mean()).sqrt().to(y.dtype)

    handles = [module.register_forward_hook(add) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
