"""The kernels of adaptive blocks, values and gradients, against float64 autograd of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from float64 import Several, agree, numbers
from tiny import dit_config, randomise
from torch import Tensor
from torch.autograd import forward_ad

from opencola.flow.dit import BlockCausalDiT
from opencola.kernels import elementwise, library
from opencola.layers.attention import rotary, turns

pytestmark = pytest.mark.usefixtures("need_kernels", "threads")
EPS = 1e-5


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 3, 7), (150, 33), (1, 1)])
def test_gelu(shape: tuple[int, ...]) -> None:
    x, bias = numbers(shape, shape[-1:])
    agree(lambda x: (elementwise.gelu(3 * x),), lambda x: (F.gelu(3 * x, approximate="tanh"),), [x])
    agree(lambda *x: (elementwise.gelu(*x),), lambda x, b: (F.gelu(x + b, approximate="tanh"),), [x, bias])


def test_gelu_of_extremes() -> None:
    x = torch.tensor([-1e4, -20.0, -0.0, 0.0, 20.0, 1e4], requires_grad=True)
    y = elementwise.gelu(x)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0, 1e4]), rtol=0, atol=1e-30)
    slopes = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slopes, rtol=0, atol=1e-20)


def places(kind: str, batch: int, rows: int) -> tuple[int, Tensor]:
    """How many times there are, and which each row has."""
    if kind == "one":
        return 1, torch.zeros(batch, rows, dtype=torch.long)
    if kind == "runs":  # some of which cross blocks of sums and the parts of threads; time 3 has no rows
        return 4, (torch.arange(batch * rows) * 3 // (batch * rows)).view(batch, rows)
    return 5, torch.randint(5, (1 if kind == "alike" else batch, rows))


@pytest.mark.parametrize("kind", ["one", "runs", "random", "alike"])
@pytest.mark.parametrize(("batch", "rows", "width"), [(2, 5, 16), (2, 131, 24), (3, 2, 7), (1, 1, 70)])
class TestResidualNorm:
    """Modulated norm, gated residual, and both."""

    @pytest.fixture
    def case(self, kind: str, batch: int, rows: int, width: int) -> tuple[Tensor, list[Tensor]]:
        count, index = places(kind, batch, rows)
        shape = (batch, rows, width)
        h, *others = numbers(shape, shape, (width,), (count, 3 * width))
        return index, [3 * h + 5, *others]  # of a mean that is not zero

    def test_modulated_norm(self, case: tuple[Tensor, list[Tensor]]) -> None:
        index, (h, _, _, modulation) = case

        def kernel(h: Tensor, modulation: Tensor) -> Several:
            _, shift, scale = modulation.chunk(3, dim=-1)
            return (elementwise.modulated_norm(h, shift, scale, index, EPS),)

        def plain(h: Tensor, modulation: Tensor) -> Several:
            _, shift, scale = modulation[index].chunk(3, dim=-1)
            return (F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift,)

        agree(kernel, plain, [h, modulation])

    @pytest.mark.parametrize("biased", [False, True])
    def test_gated(self, case: tuple[Tensor, list[Tensor]], biased: bool) -> None:
        index, (h, y, bias, modulation) = case

        def kernel(h: Tensor, y: Tensor, modulation: Tensor, *bias: Tensor) -> Several:
            return (elementwise.gated(h, modulation.chunk(3, dim=-1)[1], y, index, *bias),)

        def plain(h: Tensor, y: Tensor, modulation: Tensor, *bias: Tensor) -> Several:
            return (h + modulation[index].chunk(3, dim=-1)[1] * sum(bias, y),)

        agree(kernel, plain, [h, y, modulation, *([bias] if biased else [])])

    @pytest.mark.parametrize("biased", [False, True])
    def test_gated_norm(self, case: tuple[Tensor, list[Tensor]], biased: bool) -> None:
        index, (h, y, bias, modulation) = case

        def kernel(h: Tensor, y: Tensor, modulation: Tensor, *bias: Tensor) -> Several:
            gate, shift, scale = modulation.chunk(3, dim=-1)
            return elementwise.gated_norm(h, gate, y, shift, scale, index, EPS, *bias)

        def plain(h: Tensor, y: Tensor, modulation: Tensor, *bias: Tensor) -> Several:
            gate, shift, scale = modulation[index].chunk(3, dim=-1)
            out = h + gate * sum(bias, y)
            return out, F.layer_norm(out, out.shape[-1:], eps=EPS) * (1 + scale) + shift

        agree(kernel, plain, [h, y, modulation, *([bias] if biased else [])])


def test_tensors_may_be_strided() -> None:
    h, y, shift, scale, gate = numbers((4, 6, 3), (6, 4, 3), (5, 3), (5, 6), (3, 5))
    index = torch.randint(5, (5, 4)).T[:, :4]

    def kernel(h: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Several:
        of_h, of_y = h[:, 2:], y.transpose(0, 1)[:, 2:]
        return elementwise.gated_norm(of_h, gate.T, of_y, shift, scale[:, 2:5], index, EPS)

    def plain(h: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Several:
        out = h[:, 2:] + gate.T[index] * y.transpose(0, 1)[:, 2:]
        return out, F.layer_norm(out, (3,), eps=EPS) * (1 + scale[:, 2:5][index]) + shift[index]

    agree(kernel, plain, [h, y, shift, scale, gate])


def test_different_numbers_of_times_are_refused() -> None:
    h, one, two = numbers((2, 3, 4), (1, 4), (2, 4))
    with pytest.raises(ValueError, match=r"different numbers of times: \[1, 2\]"):
        elementwise.gated_norm(h, one, h, two, two, torch.ones(2, 3).long(), EPS)


@pytest.mark.parametrize("kernel", ["gelu", "gated", "heads"])
def test_long_sums_keep_float32s_precision(kernel: str) -> None:
    """The rows' numbers have a mean, so that a plain running sum would lose their last places."""
    rows = 100_000
    weights, (zero,) = numbers((1, rows, 2))[0] + 3, numbers((2,))
    zero.zero_().requires_grad_()
    if kernel == "gelu":  # of a slope of 1
        out = elementwise.gelu(torch.full((1, rows, 2), 30.0), zero)
    elif kernel == "gated":
        out = elementwise.gated(torch.zeros_like(weights), torch.ones(1, 2), weights, torch.zeros(1, 1).long(), zero)
    else:
        turn, gain = torch.ones(rows, 1, 1, dtype=torch.complex64), torch.ones(2)
        out = elementwise.split_heads(torch.rand(1, rows, 6), 1, (gain, zero, gain, gain), turn, EPS)[0].squeeze(2)
    (gradient,) = torch.autograd.grad((out * weights).sum(), zero)
    torch.testing.assert_close(gradient.double(), weights.double().sum((0, 1)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("of_samples", [None, 1, 3])
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(5, 2, 8), (41, 3, 16), (3, 1, 22), (4, 2, 64)])
def test_split_heads(rows: int, heads: int, head_dim: int, skip: int, of_samples: int | None) -> None:
    positions = torch.randint(100, (rows,) if of_samples is None else (of_samples, rows))
    turn = turns(rotary(positions, head_dim // 4 * 2, 10000.0), head_dim)
    inputs = numbers((3, rows, 3 * heads * head_dim), *[(head_dim,)] * 4)
    inputs[0] = 2 * inputs[0] + 3

    def kernel(qkv: Tensor, *norms: Tensor) -> Several:
        several = elementwise.split_heads(qkv, heads, norms, turn, EPS, skip)
        assert all(x.transpose(1, 2).is_contiguous() for x in several)
        return several

    def plain(qkv: Tensor, *norms: Tensor) -> Several:
        q, k, v = qkv.unflatten(-1, (3, heads, head_dim)).unbind(2)
        turned = []
        for x, gain, bias in ((q, *norms[:2]), (k, *norms[2:])):
            pairs = F.layer_norm(x, (head_dim,), gain, bias, EPS).unflatten(-1, (-1, 2))
            turned.append(torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn).flatten(-2))
        return turned[0][:, skip:], turned[1], v

    agree(kernel, plain, inputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_dit_is_the_same(recompute: bool, bias: bool) -> None:
    """Packed velocities and all gradients with kernels, and in float64 without."""
    sizes = dit_config(head_dim=10, width=18, attention_bias=bias)
    z_0, z_t, direction = numbers((2, 12, 4), (2, 3, 12, 4), (2, 3, 12, 4))
    t = torch.rand(2, 3, 3)
    found = []
    for dtype in (torch.float32, torch.float64):
        dit = randomise(BlockCausalDiT(sizes)).to(dtype)
        z = z_t.clone().to(dtype).requires_grad_()
        velocity = dit.packed(z_0.to(dtype), z, t.to(dtype), recompute=recompute)
        (velocity * direction).sum().backward()
        found.append([velocity.detach(), z.grad, *(p.grad for p in dit.parameters())])
    for actual, expected in zip(*found, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5 * scale)


def test_the_dit_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 only; not under autocast, forward-mode differentiation or `switched_off`."""
    called = []
    fetch = elementwise.function
    monkeypatch.setattr(elementwise, "function", lambda name, types: called.append(name) or fetch(name, types))
    dit, (z, tangent) = randomise(BlockCausalDiT(dit_config(num_layers=1))), numbers((1, 4, 4), (1, 4, 4))

    def run(z: Tensor) -> list[str]:
        called.clear()
        t = z.new_ones(1, 1, 1)
        dit.packed(z.detach(), z[:, None], t).sum().backward()
        return sorted(called)

    names = ["gelu", *["residual_norm"] * 4, "split_heads"]
    assert run(z.double()) == []
    dit.float()
    assert run(z) == sorted([*names, *(f"{name}_backward" for name in names)])
    with library.switched_off():
        assert run(z) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert run(z) == []
    assert library.usable(z)
    with forward_ad.dual_level():
        assert not library.usable(forward_ad.make_dual(z, tangent))


def test_nothing_comes_out_below_the_smallest_normal_number() -> None:
    """Such numbers slow products down a hundredfold, and trained models have many inputs below -10."""
    x = torch.linspace(-100, 100, 4096).view(4, 1024).requires_grad_()
    y = elementwise.gelu(x)
    (slope,) = torch.autograd.grad(y, x, torch.full_like(y, 1e-12))
    for found in (y.detach(), slope):
        assert not ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()
