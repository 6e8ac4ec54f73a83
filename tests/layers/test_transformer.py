"""Norms, time embedding and blocks against their formulas."""

import math

import pytest
import torch
from tiny import dit_config, randomise, vae_config
from torch import Tensor, nn

from opencola.layers.attention import masked, rotary, rotate_halves, rotate_pairs, turns
from opencola.layers.operations import LayerNorm, modulate
from opencola.layers.transformer import AdaptiveBlock, Block, TimeEmbedding


def norm(x: Tensor, eps: float, module: nn.Module | None = None) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return x if module is None else x * module.weight + module.bias


@pytest.mark.parametrize("affine", [True, False])
def test_norms_are_computed_in_float32(affine: bool) -> None:
    layer, x = LayerNorm(8, 1e-5, elementwise_affine=affine), torch.randn(3, 8).bfloat16()
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), norm(x.float(), 1e-5, layer if affine else None), rtol=0, atol=1e-6)


def test_time_embedding_sees_a_thousand_times_t() -> None:
    embed, t = randomise(TimeEmbedding(8)), torch.tensor([0.0, 0.37, 1.0]).double()
    phases = [[1000 * u * math.exp(-math.log(10000) * j / 128) for j in range(128)] for u in t.tolist()]
    waves = [[math.sin(p) for p in row] + [math.cos(p) for p in row] for row in phases]
    x = torch.tensor(waves, dtype=torch.float64)
    for layer in (embed.mlp_in, embed.mlp_hidden):
        x = x @ layer.weight.T + layer.bias
        x = x / (1 + torch.exp(-x))
    torch.testing.assert_close(embed(t), x @ embed.mlp_out.weight.T + embed.mlp_out.bias, rtol=1e-9, atol=1e-9)


def test_modulation_shifts_and_scales() -> None:
    x, shift, scale = torch.randn(1, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    rows = [x[0, row] * (1 + scale[m]) + shift[m] for row, m in enumerate((1, 0, 1))]
    torch.testing.assert_close(modulate(x, shift, scale, torch.tensor([[1, 0, 1]]))[0], torch.stack(rows))


def test_a_single_modulation_is_for_all_rows() -> None:
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(1, 4), torch.randn(1, 4)
    expected = modulate(x, shift, scale, torch.zeros(2, 3, dtype=torch.long))
    gathered = modulate(x, shift.repeat(2, 1), scale.repeat(2, 1), torch.ones(2, 3, dtype=torch.long))
    assert torch.equal(expected, gathered)


@pytest.mark.parametrize("skip", [0, 2])
def test_adaptive_block(skip: int) -> None:
    c = dit_config()
    block = randomise(AdaptiveBlock(c.width, c.num_heads, c.head_dim, c.expansion, 1e-5, attention_bias=True))
    h, modulation = torch.randn(2, 5, c.width).double(), torch.randn(2, 5, 6 * c.width).double()
    turn = turns(rotary(torch.arange(5), c.rope_dim, 10000.0, torch.float64), c.head_dim)
    mask = torch.ones(5, 5).tril().bool()
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, -1)
    q, k, v = block.qkv(norm(h, 1e-5) * (1 + scale_1) + shift_1).view(2, 5, 3, c.num_heads, c.head_dim).unbind(2)
    q, k = (rotate_pairs(norm(x, 1e-5, m), turn) for x, m in ((q, block.norm_q), (k, block.norm_k)))
    expected = h + gate_1 * block.attention_out(masked(mask)(0, q, k, v).flatten(2))
    u = block.mlp_in(norm(expected, 1e-5) * (1 + scale_2) + shift_2)
    u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    expected = expected + gate_2 * block.mlp_out(u)
    out = block(h, 0, modulation.flatten(0, 1), torch.arange(10).view(2, 5), turn, masked(mask[skip:]), skip)
    torch.testing.assert_close(out, expected[:, skip:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "silu"])
@pytest.mark.parametrize("multi_query", [False, True])
@pytest.mark.parametrize("post_norm", [True, False])
def test_vae_block(post_norm: bool, multi_query: bool, activation: str) -> None:
    c = vae_config(post_norm=post_norm, multi_query=multi_query, activation=activation, clip_qkv=0.8).block
    block, x, width = randomise(Block(c)), torch.randn(2, 5, c.width).double(), c.width // c.num_heads
    table, mask = rotary(torch.arange(5), width, 5e5, torch.float64), torch.ones(5, 5).tril().bool()
    qkv = block.qkv(x if post_norm else norm(x, c.norm_eps, block.norm_attention)).clamp(-0.8, 0.8)
    kv_heads = 1 if multi_query else c.num_heads
    q, k, v = qkv.split([c.width, kv_heads * width, kv_heads * width], -1)
    q, k = norm(q, c.norm_eps, block.norm_q), norm(k, c.norm_eps, block.norm_k)
    q, k, v = q.view(2, 5, -1, width), k.view(2, 5, -1, width), v.view(2, 5, -1, width)
    attended = masked(mask)(0, rotate_halves(q, table), rotate_halves(k, table), v).flatten(2)
    attended = block.attention_out(attended)

    def mlp(y: Tensor) -> Tensor:
        y = block.mlp_in(y)
        if activation == "swiglu":
            value, gate = y.chunk(2, -1)
            y = value * gate / (1 + torch.exp(-gate))
        else:
            y = y / (1 + torch.exp(-y)) if activation == "silu" else 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        return block.mlp_out(y)

    if post_norm:
        expected = norm(x, c.norm_eps, block.norm_attention) + attended
        expected = expected + norm(mlp(expected), c.norm_eps, block.norm_mlp)
    else:
        expected = x + attended
        expected = expected + mlp(norm(expected, c.norm_eps, block.norm_mlp))
    torch.testing.assert_close(block(x, 0, table, masked(mask)), expected, rtol=1e-10, atol=1e-10)
