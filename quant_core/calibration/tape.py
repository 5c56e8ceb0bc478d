"""What a network was called with while it sampled, and what its blocks returned at one boundary: enough to
run the blocks behind it again."""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..store.atomic import require_room
from .segments import Chain, Form
from .spill import Spill

VALUES = 256  # of a block's output, that a replay is compared with
# How far a replay may be off: rounding of other tiles on a GPU is 2^-9 of a bf16 value, over ten blocks a
# third of this. On a CPU it is off by nothing.
TOLERANCE = 2.0**-6


# What a network that cannot be recorded or run again may raise; an interrupt is none of these.
UNFIT = (OSError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class NoReplay(RuntimeError):
    """Replaying cannot give what the sampling did; the samplings have to be repeated."""


@dataclass(frozen=True)
class Layout:
    """How a tensor lay that is kept in the order of its strides: products of expanded or transposed matrices
    differ from those of contiguous ones in their last bit."""

    order: tuple[int, ...]
    shape: torch.Size

    def laid(self, kept: torch.Tensor) -> torch.Tensor:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return kept.permute(back).expand(self.shape)


def packed(tensor: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """A contiguous copy on the CPU, without what `expand` repeats, and how it lay."""
    core = tensor.detach()
    for i, (size, stride) in enumerate(zip(core.shape, core.stride(), strict=True)):
        if size > 1 and not stride:
            core = core.narrow(i, 0, 1)
    order = tuple(sorted(range(core.ndim), key=core.stride, reverse=True))
    # A clone of a single expanded value keeps its stride of 0, and views of bytes refuse that.
    kept = torch.empty([core.shape[i] for i in order], dtype=core.dtype, device="cpu")
    return kept.copy_(core.permute(order)), Layout(order, tensor.shape)


@dataclass(frozen=True)
class Kept:
    """Stands for a tensor in recorded arguments, and says where and how it lay."""

    name: str
    device: torch.device
    layout: Layout


@dataclass
class Taped:
    """One evaluation of the network. index: its number; arguments: (args, kwargs) with Kept for tensors;
    marks: {block: some values of what it returned}."""

    index: int
    sample: int
    step: int
    timestep: float
    arguments: Any
    marks: dict[int, torch.Tensor] = field(default_factory=dict)


class Tape:
    """Watches a sampling network (`sampling`), then hands out its calls.

    boundary: the number of blocks whose outputs are recorded, 0 for none: a call is gone on with from there.
    marked: numbers of blocks whose outputs a replay is compared with. reason: why this cannot be replayed,
    "" while it can; nothing is kept then.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        blocks: list[str],
        spill: Spill,
        boundary: int,
        marked: list[int],
    ):
        self.network = network
        self.chain = Chain(network, blocks, self._called)
        self.spill, self.boundary, self.marked = spill, boundary, set(marked)
        self.calls: list[Taped] = []
        self.reason = ""
        self._off: list[torch.Tensor] = []
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._next = len(self.chain)  # the block that has to be called now

    def of_sample(self, sample: int) -> list[Taped]:
        """The calls of a sampling run, in order."""
        return [call for call in self.calls if call.sample == sample]

    def give_up(self, reason: str):
        """Keeps nothing from here on."""
        self.reason = self.reason or reason
        self.spill.clear()
        self.calls.clear()
        self.chain.forms.clear()

    def begin(self, sample: int, step: int, timestep: float, args: tuple, kwargs: dict):
        """Before an evaluation network(*args, **kwargs) of a sampling."""
        self.end()
        if self.reason:
            return
        if not args and not kwargs:
            self.give_up("the network's arguments are not known")
            return
        self._guarded(lambda: self._begin(sample, step, timestep, args, kwargs))

    def _begin(self, sample, step, timestep, args, kwargs):
        index = len(self.calls)
        arguments = _recorded((list(args), dict(kwargs)), self._keep)
        self.calls.append(Taped(index, sample, step, timestep, arguments))
        self.chain.forms[index] = [None] * len(self.chain)
        self._next = 0

    def end(self):
        """After the last evaluation of a sampling."""
        if not self.reason and self._next != len(self.chain):
            self.give_up(f"block {self.chain.names[self._next]} was not called")
        self._next = len(self.chain)

    def require_room(self, done: int, samples: int):
        """Gives up where there is no room for what all samples will have, by the `done` first ones."""
        held = self.spill.in_memory + self.spill.on_disk
        left = held * samples // done - max(held, self.spill.memory)
        self._guarded(lambda: require_room(self.spill.folder / "file", left) if left > 0 else None)

    def _guarded(self, work: Callable[[], None]):
        try:
            work()
        except UNFIT as error:
            self.give_up(f"{type(error).__name__}: {error}")

    @contextmanager
    def sampling(self):
        """Watches the blocks while a sampling runs."""
        handles = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(self.chain.modules)]
        try:
            yield
            self.end()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, i):
        def after(module, args, out):
            if self.reason:
                return
            if self._next != i:
                self.give_up(f"block {self.chain.names[i]} was called out of turn")
                return
            self._next = i + 1
            self._guarded(lambda: self._returned(i, Form(out)))

        return after

    def _returned(self, i, form):
        call, state = self.calls[-1], form.state
        if i + 1 in self.marked:
            call.marks[i + 1] = _mark(state)
        if i + 1 == self.boundary:
            self._put(call.index, state)
        self.chain.forms[call.index][i] = form.without_state()

    def _keep(self, tensor):
        kept, layout = packed(tensor)
        content = hashlib.blake2b(kept.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=12)
        content.update(f"{kept.dtype}{tuple(kept.shape)}".encode())
        name = content.hexdigest()  # a text is the same at each step, and kept once
        if name not in self.spill:
            self.spill.put(name, kept)
        return Kept(name, tensor.device, layout)

    def _put(self, index, state):
        i = 0
        while (name := f"{index}.{i}") in self.spill:  # there may have been two streams, and one now
            self.spill.drop(name)
            i += 1
        for i, tensor in enumerate(state):
            if tensor is not None:
                kept, self._layouts[index, i] = packed(tensor)
                self.spill.put(f"{index}.{i}", kept)

    def _get(self, index):
        tensors = self.chain.forms[index][self.boundary - 1].tensors
        one = lambda i: self._layouts[index, i].laid(self.spill.get(f"{index}.{i}"))
        return tuple(None if t is None else one(i) for i, t in enumerate(tensors))

    def _called(self, index):
        """The network on fresh copies of a call's arguments: networks write into them."""
        args, kwargs = _given(self.calls[index].arguments, self.spill.get)
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def play(self, call: Taped, stop: int, boundary: int | None):
        """Runs the blocks from the boundary up to `stop` on a call, and up to the next `boundary` if there is
        one: what is returned there is recorded, to go on with once all calls have been played and `advance`
        was called."""
        first, state = self.boundary, self._get(call.index) if self.boundary else None
        for edge in sorted({stop, boundary or stop} - {first}):
            state = self.chain.run(call.index, first, edge, state)
            first = edge
            if edge in call.marks:
                self._off.append(_distance(call.marks[edge], _mark(state)))
            if edge == boundary:
                self._put(call.index, state)

    def checked(self):
        """Raises NoReplay where a call played since the last time has given anything else than while
        sampling. The host waits for the device once."""
        found, self._off = self._off, []
        if found and not float(torch.stack(found).max()) <= TOLERANCE:
            raise NoReplay("a block gave something else than while sampling")

    def advance(self, boundary: int):
        """All calls have been played up to there."""
        self.boundary = boundary


def _mark(state) -> torch.Tensor:
    """Values from all over the outputs of a block, fp32. An odd distance between them: an even one may hit
    the same channel of every token."""
    flat = [t.detach().reshape(-1) for t in state if t is not None]
    return torch.cat([t[:: max(1, t.numel() // VALUES) | 1].float() for t in flat])


def _distance(want, found) -> torch.Tensor:
    if want.shape != found.shape:
        return torch.full((), torch.inf, device=found.device)
    return (found - want).norm() / want.norm().clamp_min(1e-20)


def _recorded(value, keep):
    """Containers are copied, tensors kept, all else is the object itself: patches and callbacks of the very
    model that is replayed."""
    if isinstance(value, torch.Tensor):
        return keep(value)
    if type(value) in (list, tuple):
        return type(value)(_recorded(v, keep) for v in value)
    if type(value) is dict:
        return {k: _recorded(v, keep) for k, v in value.items()}
    return value


def _given(value, get):
    if isinstance(value, Kept):
        return value.layout.laid(get(value.name).to(value.device, copy=True))
    if type(value) in (list, tuple):
        return type(value)(_given(v, get) for v in value)
    if type(value) is dict:
        return {k: _given(v, get) for k, v in value.items()}
    return value
