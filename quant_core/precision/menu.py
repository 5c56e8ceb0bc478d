"""Layers of one model with methods and precisions of their own: a menu, and the fit that looks a layer's
entry up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

from ..layer.linear import QuantizedLayer
from ..layer.precisions import w4a8, w8a8
from ..layer.problem import Fitted, Problem
from ..methods import Method, by_name, fit_problem

SIXTEEN = "16 bit"


@dataclass(frozen=True)
class Entry:
    """What a layer may be. method: a name of METHODS, "" for 16 bit; options: of its config, ((name, value),
    ...).

    raised: "W4A8" or "W8A8", what Guard makes of the method's layer; "" for the layer itself.
    """

    name: str
    method: str = ""
    options: tuple[tuple[str, object], ...] = ()
    raised: str = ""


def _activations(method, *bits):
    return tuple(Entry(f"{method} A{b}", method, (("activation_bits", b),)) for b in bits)


# Entries that share a fit follow each other.
MENUS = {
    "robuq": _activations("robuq", 1, 2, 3, 4, 8),
    "mixed": (
        *_activations("robuq", 1, 2, 3, 4),
        Entry("svdquant_r W4A4", "svdquant_r"),
        Entry("svdquant_r W4A8", "svdquant_r", raised="W4A8"),
        Entry("svdquant_r W8A8", "svdquant_r", raised="W8A8"),
        Entry(SIXTEEN),
    ),
}


def menu(name: str) -> tuple[Entry, ...]:
    """The menu called `name`; ValueError listing all otherwise."""
    if name not in MENUS:
        raise ValueError(f"unknown menu {name!r}. Menus: {', '.join(MENUS)}.")
    return MENUS[name]


@dataclass(frozen=True)
class MixedConfig:
    """layers: {layer: name of its entry}, for all but weight-only layers. rank, gptq: of every method that
    has them."""

    menu: tuple[Entry, ...] = MENUS["robuq"]
    rank: int = 32
    gptq: bool = True
    layers: dict[str, str] = field(default_factory=dict)


def variants(
    make: Callable[[], Problem], config: MixedConfig
) -> Iterator[tuple[Entry, QuantizedLayer | None]]:
    """Yields each entry of the menu with the layer it gives, None at 16 bit; one fit and its relatives in
    memory at a time.

    make(): the Problem, anew each time, since a fit uses up its second moments.
    """
    fit_of, base, problem = None, None, None
    for entry in config.menu:
        if not entry.method:
            yield entry, None
            continue
        if fit_of != (entry.method, entry.options):
            fit_of, problem = (entry.method, entry.options), make()
            base = _fit(problem, entry, config).layer
        yield entry, _raised(problem, base, entry)


def fit(problem: Problem, config: MixedConfig) -> Fitted:
    """The layer's entry; `Fitted.layer` is None at 16 bit. Raises ValueError for a layer that has no
    entry."""
    entry = next((e for e in config.menu if e.name == config.layers.get(problem.layer.name)), None)
    if entry is None:
        raise ValueError(
            f"layer {problem.layer.name}: the allocation says nothing of it; it names {len(config.layers)} "
            "layers"
        )
    if not entry.method:
        return Fitted(None, {"allocated": entry.name})
    fitted = _fit(problem, entry, config)
    return Fitted(_raised(problem, fitted.layer, entry), {"allocated": entry.name} | fitted.choices)


MIXED = Method("mixed", "a precision for each layer", fit, MixedConfig())


def _fit(problem, entry, config):
    method = by_name(entry.method)
    shared = {f.name for f in fields(method.config)} & {"rank", "gptq"}
    options = {name: getattr(config, name) for name in shared} | dict(entry.options)
    return fit_problem(problem, method, method.configured(**options))


def _raised(problem, layer, entry):
    if entry.raised == "W4A8":
        return w4a8(layer)
    return w8a8(problem, layer) if entry.raised == "W8A8" else layer
