import pytest
import torch

from comfyui_nibble.quant_core.calibration.segments import Chain, replaced

pytestmark = pytest.mark.quick

CALLS = 2


class Double(torch.nn.Module):
    """Two streams, joined as in FLUX; adds to its inputs in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, a, b, bias=None):
        a += self.a(a) + b.mean(1, keepdim=True)
        b += self.b(b) + a.mean(1, keepdim=True)
        return a, b if bias is None else b + bias


class Single(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.a(x).tanh()


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.pair = torch.nn.ModuleList(Double() for _ in range(2))
        self.single = torch.nn.ModuleList(Single() for _ in range(3))

    def forward(self, a, b):
        a, b = self.into(a), self.into(b)
        for block in self.pair:
            a, b = block(a, b, bias=0.5)
        x = torch.cat([a, b.to(a.dtype)], 1)
        for block in self.single:
            x = block(x)
        return self.out(x[:, : a.shape[1]])


BLOCKS = ["pair.0", "pair.1", "single.0", "single.1", "single.2"]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().requires_grad_(False)


@pytest.fixture
def chain(network):
    """The network on two inputs of different lengths."""
    inputs = [(torch.randn(1, 3 + i, 4), torch.randn(1, 2, 4)) for i in range(CALLS)]
    return Chain(network, BLOCKS, lambda i: network(*(x.clone() for x in inputs[i])))


def states(network, chain, index):
    """[outputs of each block..., (prediction,)] of the plain forward."""
    out, handles = [], []
    for name in BLOCKS:
        keep = lambda m, a, y: out.append(tuple(t.clone() for t in (y if isinstance(y, tuple) else (y,))))
        handles.append(network.get_submodule(name).register_forward_hook(keep))
    prediction = chain.call(index)
    for handle in handles:
        handle.remove()
    return [*out, (prediction,)]


def clean(network):
    return all("forward" not in m.__dict__ and not m._forward_hooks for m in network.modules())


def test_every_cut_equals_the_whole_forward(network, chain):
    assert len(chain) == 5
    for index in range(CALLS):
        want = states(network, chain, index)
        assert [len(s) for s in want] == [2, 2, 1, 1, 1, 1]
        for first in range(5):
            for stop in range(first + 1, 7):
                state = None if first == 0 else chain.run(index, 0, first, None)
                kept = None if state is None else [t.clone() for t in state]
                got = chain.run(index, first, stop, state)
                assert len(got) == len(want[stop - 1])
                assert all(torch.equal(g, w) for g, w in zip(got, want[stop - 1], strict=True)), (first, stop)
                if state is not None:  # blocks that add in place have copies
                    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert clean(network)


def test_states_of_another_run_arrive(network, chain):
    """What comes out of a run is computed from the state that is given, not from the full forward."""
    a, b = chain.run(0, 0, 2, None)
    other = (a + 1, b - 1)
    x = torch.cat(other, 1)
    for block in network.single:
        x = block(x)
    assert torch.equal(chain.run(0, 2, 5, other)[0], x)
    assert torch.equal(chain.run(0, 2, 6, other)[0], network.out(x[:, :3]))
    assert torch.equal(chain.run(0, 4, 5, (x,))[0], network.single[2](x))


def test_blocks_before_a_run_are_not_computed(network, chain):
    state = chain.run(0, 0, 3, None)
    computed = []
    for block in (*network.pair, *network.single):
        block.a.register_forward_hook(lambda m, a, y: computed.append(m))
    chain.run(0, 3, 4, state)
    assert computed == [network.single[1].a]  # and none behind it


def test_gradients_reach_the_blocks_of_the_run(network, chain):
    network.single.requires_grad_(True)
    with torch.no_grad():
        state = chain.run(0, 0, 3, None)
    (y,) = chain.run(0, 3, 6, state)
    y.sum().backward()
    assert network.single[0].a.weight.grad is None
    assert network.single[1].a.weight.grad.abs().sum() > 0
    assert network.single[2].a.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("stop", [4, 6])
def test_nothing_is_left_after_an_error(network, chain, stop):
    state = chain.run(0, 0, 2, None)
    handle = network.single[1].a.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chain.run(0, 2, stop, state)
    handle.remove()
    assert clean(network)
    assert torch.equal(chain.run(0, 2, 6, state)[0], states(network, chain, 0)[5][0])


def test_forwards_that_were_replaced_before_come_back(network):
    """ComfyUI and other packs set forwards of their own on modules."""
    own = lambda x: x
    network.single[0].forward = own
    with (
        pytest.raises(ZeroDivisionError),
        replaced({network.single[0]: lambda x: 1 / 0, network.single[1]: lambda x: x}),
    ):
        network.single[0](0)
    assert network.single[0].forward is own
    assert "forward" not in network.single[1].__dict__
