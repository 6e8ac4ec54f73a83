"""The kernels of blocks without modulation, values and gradients, against float64 autograd of the plain formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from float64 import Several, agree, numbers
from tiny import randomise, vae_config
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from opencola.kernels import library, plain
from opencola.layers.attention import masked, rotary, rotate_halves
from opencola.layers.llama import Llama, LlamaConfig
from opencola.vae.text_vae import TextVAE

pytestmark = pytest.mark.usefixtures("need_kernels", "threads")
EPS = 1e-5
SHAPES = [(3, 5, 16), (2, 131, 24), (150, 33), (1, 2), (2, 3, 70), (0, 7)]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], affine: bool, residual: bool) -> None:
    x, r, gain, bias = numbers(shape, shape, shape[-1:], shape[-1:])
    inputs = [3 * x + 5, *([r] if residual else []), *([gain, bias] if affine else [])]

    def parts(tensors: Several) -> tuple[Tensor | None, Several]:
        return (tensors[0], tensors[1:]) if residual else (None, tensors)

    def kernel(x: Tensor, *others: Tensor) -> Several:
        r, norm = parts(others)
        return (plain.layer_norm(x, EPS, *norm or (None, None), r),)

    def formula(x: Tensor, *others: Tensor) -> Several:
        r, norm = parts(others)
        x = x - x.mean(-1, keepdim=True)
        normal = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        normal = normal * norm[0] + norm[1] if norm else normal
        return (normal if r is None else normal + r,)

    agree(kernel, formula, inputs)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_rms_norm(shape: tuple[int, ...], added: bool) -> None:
    h, gain, y = numbers(shape, shape[-1:], shape)

    def kernel(h: Tensor, gain: Tensor, y: Tensor | None = None) -> Several:
        return plain.residual_rms_norm(h, y, EPS, gain)[y is None :]

    def formula(h: Tensor, gain: Tensor, y: Tensor | None = None) -> Several:
        out = h if y is None else h + y
        u = out * gain / (out.square().mean(-1, keepdim=True) + EPS).sqrt()
        return (u,) if y is None else (out, u)

    agree(kernel, formula, [h, gain, *([y] if added else [])])


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, ...], biased: bool, gate_first: bool) -> None:
    wide = (*shape[:-1], 2 * shape[-1])
    x, bias = numbers(wide, wide[-1:])

    def formula(x: Tensor, bias: Tensor | None = None) -> Several:
        gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
        gate, value = (gate, value) if gate_first else (value, gate)
        return (value * gate / (1 + torch.exp(-gate)),)

    def kernel(x: Tensor, bias: Tensor | None = None) -> Several:
        return (plain.swiglu(x, bias, gate_first),)

    agree(kernel, formula, [3 * x, *([bias] if biased else [])])


@pytest.mark.parametrize("norms", ["none", "plain", "affine"])
@pytest.mark.parametrize("of_samples", [None, 1, 3])
@pytest.mark.parametrize(
    ("rows", "heads", "shared", "head_dim"),
    [(5, 2, 2, 16), (41, 4, 2, 32), (3, 3, 1, 22), (131, 2, 2, 64), (0, 2, 1, 6)],
)
def test_rotated_heads(rows: int, heads: int, shared: int, head_dim: int, of_samples: int | None, norms: str) -> None:
    positions = torch.randint(100, (rows,) if of_samples is None else (of_samples, rows))
    tables = {dtype: rotary(positions, head_dim, 10000.0, dtype) for dtype in (torch.float32, torch.float64)}
    widths = [heads * head_dim, shared * head_dim]
    inputs = numbers((3, rows, widths[0] + 2 * widths[1]), *[(n,) for n in widths for _ in range(2)])
    inputs = [2 * inputs[0] + 3, *(inputs[1:] if norms == "affine" else [])]

    def kernel(qkv: Tensor, *of_norms: Tensor) -> Several:
        none = None if norms == "none" else (None,) * 4
        several = plain.rotated_heads(qkv, heads, shared, tables[torch.float32], of_norms or none, EPS)
        assert all(x.transpose(1, 2).is_contiguous() for x in several)
        return several

    def formula(qkv: Tensor, *of_norms: Tensor) -> Several:
        q, k, v = qkv.split([widths[0], widths[1], widths[1]], dim=-1)
        if norms != "none":
            q = F.layer_norm(q, q.shape[-1:], *of_norms[:2], eps=EPS)
            k = F.layer_norm(k, k.shape[-1:], *of_norms[2:], eps=EPS)
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        return rotate_halves(q, tables[torch.float64]), rotate_halves(k, tables[torch.float64]), v

    agree(kernel, formula, inputs)


def test_tensors_may_be_strided() -> None:
    h, y, gain = numbers((4, 6, 3), (6, 4, 3), (6,))

    def kernel(h: Tensor, y: Tensor, gain: Tensor) -> Several:
        return plain.residual_rms_norm(h[:, 2:], y.transpose(0, 1)[:, 2:], EPS, gain[::2])[1:]

    def formula(h: Tensor, y: Tensor, gain: Tensor) -> Several:
        return (F.rms_norm(h[:, 2:] + y.transpose(0, 1)[:, 2:], (3,), gain[::2], EPS),)

    agree(kernel, formula, [h, y, gain])
    agree(lambda h: (plain.layer_norm(h.mT, EPS),), lambda h: (F.layer_norm(h.mT, (6,), eps=EPS),), [h])
    agree(lambda h: (plain.swiglu(h.mT, None, True),), lambda h: (h.mT[..., 3:] * F.silu(h.mT[..., :3]),), [h])


def test_gradients_may_have_any_strides() -> None:
    (qkv,) = numbers((2, 5, 3 * 2 * 8))
    table = rotary(torch.arange(5), 8, 10000.0)
    direction = torch.randn(8, 2, 5, 2).permute(1, 2, 3, 0)
    found = []
    for weights in (direction, direction.contiguous(), direction.transpose(1, 2).contiguous().transpose(1, 2)):
        x = qkv.clone().requires_grad_()
        several = plain.rotated_heads(x, 2, 2, table, None, EPS)
        found.append(torch.autograd.grad(several, x, [weights] * 3)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    x = qkv.clone().requires_grad_()
    (of_ones,) = torch.autograd.grad(sum(part.sum() for part in plain.rotated_heads(x, 2, 2, table, None, EPS)), x)
    assert torch.equal(of_ones[..., -16:], torch.ones(2, 5, 16))


def test_tensors_need_not_be_aligned() -> None:
    wide, gain = torch.randn(1 + 5 * 20), torch.randn(21)[1:]
    x, straight = wide[1:].view(5, 20), wide[1:].view(5, 20).clone()
    assert x.data_ptr() % 16
    for run in (
        lambda x: plain.layer_norm(x, EPS, gain, gain, x),
        lambda x: plain.residual_rms_norm(x, x, EPS, gain)[1],
        lambda x: plain.swiglu(x, gain, True),
    ):
        assert torch.equal(run(x), run(straight))


def every_kernel(x: Tensor, gain: Tensor) -> Several:
    """Of x (B, R, 48) and gain (48)."""
    table, quarter = rotary(torch.arange(x.shape[1]), 8, 10000.0), gain[:16]
    return (
        plain.layer_norm(x, EPS, gain, gain, x),
        *plain.residual_rms_norm(x, x, EPS, gain),
        plain.swiglu(x, gain, True),
        *plain.rotated_heads(x, 2, 2, table, (quarter,) * 4, EPS),
    )


def test_a_row_is_the_same_beside_any_others() -> None:
    x, gain = numbers((7, 33, 48), (48,))
    together = every_kernel(x, gain)
    for alone, several in zip(every_kernel(x[2:3, :5], gain), together, strict=True):
        assert torch.equal(alone, several[2:3, :5])


def test_sums_over_rows_do_not_depend_on_threads() -> None:
    x, gain = numbers((7, 33, 48), (48,))
    found = []
    for count in (torch.get_num_threads(), 3):
        torch.set_num_threads(count)
        leaves = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
        found.append(torch.autograd.grad(sum(part.square().sum() for part in every_kernel(*leaves)), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(value: float) -> None:
    x, gain = numbers((2, 3, 48), (48,))
    x[0, 1] = value
    for part in every_kernel(x, gain):
        assert not part[0, 1].isfinite().all() and part[1].isfinite().all() and part[0, ::2].isfinite().all()
    (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in every_kernel(x.requires_grad_(), gain)), x)
    assert not gradient[0, 1].isfinite().any() and gradient[1].isfinite().all()


def test_numbers_below_the_smallest_normal_one() -> None:
    x, gain = numbers((2, 3, 48), (48,))
    x = 1e-40 * x
    for found, expected in zip(every_kernel(x, gain), every_kernel(torch.zeros_like(x), gain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-35)


def test_swiglu_of_extremes() -> None:
    gates = torch.tensor([-torch.inf, -1e4, -100.0, -89.0, -31.0, 0.0, 31.0, 1e4])
    x = torch.stack((gates, torch.ones(8)), dim=-1).requires_grad_()
    y = plain.swiglu(x, None, True)[:, 0]
    expected = torch.tensor([torch.nan, 0.0, 0.0, 0.0, 0.0, 0.0, 31.0, 1e4])
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-11, equal_nan=True)
    slopes = torch.autograd.grad(y[1:].sum(), x)[0][1:, 0]
    torch.testing.assert_close(slopes, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0]), rtol=1e-6, atol=1e-11)
    x = torch.stack((torch.linspace(-100, 100, 4096), torch.ones(4096)), dim=-1).requires_grad_()
    y = plain.swiglu(x, None, True)
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 1e-12))
    for found in (y.detach(), gradient):  # numbers so small slow products down a hundredfold
        assert not ((found != 0) & (found.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize("kernel", ["norm", "swiglu", "heads"])
def test_long_sums_keep_float32s_precision(kernel: str) -> None:
    """The rows' numbers have a mean, so that a plain running sum would lose their last places."""
    weights, zero = numbers((1, 100_000, 2))[0] + 3, torch.zeros(2, requires_grad=True)
    x, one = torch.rand(1, 100_000, 2), torch.ones(2)
    if kernel == "norm":
        out = plain.layer_norm(x, EPS, one, zero)
    elif kernel == "swiglu":  # of a slope of 1
        x, weights = torch.full_like(x, 30.0), weights[..., :1]
        out = plain.swiglu(x, zero, True) / 30
    else:
        table = torch.ones(100_000, 1, 1), torch.zeros(100_000, 1, 1)
        out = plain.rotated_heads(x.repeat(1, 1, 3), 1, 1, table, (one, zero, one, zero.detach()), EPS)[0].squeeze(2)
    (gradient,) = torch.autograd.grad((out * weights).sum(), zero)
    torch.testing.assert_close(gradient.double(), weights.double().sum((0, 1)).expand(2), rtol=2e-6, atol=0)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    x, gain = numbers((1, 2, 48), (48,))
    x.requires_grad_()
    for part in every_kernel(x, gain)[1:]:
        (gradient,) = torch.autograd.grad(part.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("model", ["llama", "shared heads", "vae", "pre-norm"])
def test_models_are_the_same(model: str) -> None:
    """Values and all gradients with kernels, and in float64 without."""
    (h,) = numbers((2, 12, 16))
    found = []
    for dtype in (torch.float32, torch.float64):
        run: Callable[[], Tensor]
        if model in ("llama", "shared heads"):
            net = randomise(Llama(LlamaConfig(16, 2, 4, 2 if model == "shared heads" else None, 24))).to(dtype)
            run = lambda: net(h.to(dtype), torch.arange(12), masked(None))  # noqa: B023, E731
        else:
            net = randomise(TextVAE(vae_config(post_norm=model == "vae"))).to(dtype)
            run = lambda: net.decode(net.encode(torch.arange(24).view(2, 12)).mean)  # noqa: B023, E731
        out = run()
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_models_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 only; not under autocast, forward-mode differentiation, torch.compile or `switched_off`."""
    called = []
    fetch = plain.function
    monkeypatch.setattr(plain, "function", lambda name, types: called.append(name) or fetch(name, types))
    llama, vae = Llama(LlamaConfig(16, 1, 4, None, 24)), TextVAE(vae_config(encoder_layers=1, decoder_layers=0))
    (h,) = numbers((2, 5, 16))

    def run(h: Tensor) -> list[str]:
        called.clear()
        llama(h, torch.arange(5), masked(None)).sum().backward()
        return sorted(called)

    names = [*["plain_norm"] * 3, "rotated_heads", "swiglu"]
    every = sorted([*names, *(f"{name}_backward" for name in names)])
    assert run(h) == every
    vae.encode(torch.zeros(1, 3, dtype=torch.long))
    assert called[len(every) :] == ["rotated_heads", "plain_norm", "swiglu", "plain_norm"]
    with library.switched_off():
        assert run(h) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert run(h) == []
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # torch's others have no forward mode
        out = llama(forward_ad.make_dual(h, h), torch.arange(5), masked(None))
        assert forward_ad.unpack_dual(out).tangent is not None and called == []
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    with library.switched_off():
        expected = llama(h, torch.arange(5), masked(None))
    assert torch.equal(compiled(h, torch.arange(5), masked(None)), expected) and called == []
    llama.double()
    assert run(h.double()) == []
