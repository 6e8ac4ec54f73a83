"""A second implementation of the public release, for tests: slow, float64, one sample at a time, no caches.

Written from the description of the format alone (sections 3, 4 and 7; 5 and 6 are in reference_generation.py). It
shares no code with opencola: it works on the tensors of the files by their own names. `python tests/make_golden.py`
writes the fixtures in tests/golden with it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Config = dict[str, Any]
Weights = dict[str, Tensor]
Model = tuple[Config, Weights]


def read_model(folder: Path) -> Model:
    """config.json and tensors, in float64."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), weights


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def affine_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return norm(x, eps) * w.get(f"{name}.weight", 1) + w.get(f"{name}.bias", 0)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turns(positions: Sequence[int], width: int, base: float) -> Tensor:
    """Unit complex numbers (R, width / 2) of the rotary angles."""
    angles = [[p * base ** (-2 * j / width) for j in range(width // 2)] for p in positions]
    return torch.polar(
        torch.ones(len(positions), width // 2).double(), torch.tensor(angles).double().reshape(-1, width // 2)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """One head: q (R, Dh), k and v (T, Dh), allowed (R, T)."""
    scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def block_causal(positions: Sequence[int], block_size: int) -> Tensor:
    """Who sees whom when every row is both query and key."""
    return torch.tensor([[p // block_size >= r // block_size for r in positions] for p in positions])


# Section 3: the DiT


def time_embedding(w: Weights, times: Tensor) -> Tensor:
    rows = []
    for t in times.tolist():
        phases = [t * math.exp(-math.log(10000) * j / 128) for j in range(128)]
        rows.append([math.sin(p) for p in phases] + [math.cos(p) for p in phases])
    s = torch.tensor(rows).double()
    return linear(w, "emb_in.proj_out", silu(linear(w, "emb_in.proj_hid", silu(linear(w, "emb_in.proj_in", s)))))


def dit(model: Model, x: Tensor, times: Tensor, positions: Sequence[int], allowed: Tensor) -> Tensor:
    """Velocity (R, d) of rows x (R, d) at row times (R,) in 0..1000."""
    c, w = model
    x, times, eps = x.double(), times.double(), c["norm_eps"]
    embedded: dict[float, Tensor] = {t: time_embedding(w, torch.tensor([t]).double())[0] for t in set(times.tolist())}
    a = silu(torch.stack([embedded[t] for t in times.tolist()]))
    turn = turns(positions, c["rope_dim"], 10000)

    def rotate(head: Tensor) -> Tensor:
        pairs = torch.view_as_complex(head[:, : c["rope_dim"]].reshape(len(head), -1, 2).contiguous())
        return torch.cat((torch.view_as_real(pairs * turn).flatten(1), head[:, c["rope_dim"] :]), dim=1)

    h = linear(w, "txt_in.proj", x)
    for i in range(c["num_layers"]):
        block = f"blocks.{i}"
        shift, scale = linear(w, f"{block}.ada.msa_in.1", a).chunk(2, -1)
        u = norm(h, eps) * (1 + scale) + shift
        q, k, v = linear(w, f"{block}.msa.proj_qkv", u).chunk(3, -1)
        heads = []
        for number in range(c["heads"]):
            part = slice(number * c["head_dim"], (number + 1) * c["head_dim"])
            q_head = rotate(affine_norm(w, f"{block}.msa.norm_q", q[:, part], eps))
            k_head = rotate(affine_norm(w, f"{block}.msa.norm_k", k[:, part], eps))
            heads.append(attend(q_head, k_head, v[:, part], allowed))
        h = h + linear(w, f"{block}.ada.msa_out.1", a) * linear(w, f"{block}.msa.proj_out", torch.cat(heads, 1))
        shift, scale = linear(w, f"{block}.ada.mlp_in.1", a).chunk(2, -1)
        u = norm(h, eps) * (1 + scale) + shift
        update = linear(w, f"{block}.mlp.proj_out", gelu_tanh(linear(w, f"{block}.mlp.proj_in", u)))
        h = h + linear(w, f"{block}.ada.mlp_out.1", a) * update
    shift, scale = linear(w, "txt_out_ada.out_in.1", a).chunk(2, -1)
    return linear(w, "txt_out.proj", affine_norm(w, "txt_out_norm", h, eps) * (1 + scale) + shift)


def dit_after(model: Model, history: Tensor, x: Tensor, times: Tensor) -> Tensor:
    """Velocity of rows x that follow a clean history (committed at time 0), all block-causal."""
    positions = range(len(history) + len(x))
    rows = torch.cat((history.double(), x.double()))
    all_times = torch.cat((torch.zeros(len(history)).double(), times.double()))
    return dit(model, rows, all_times, positions, block_causal(positions, model[0]["block_size"]))[len(history) :]


# Section 4: the VAE


def transform(model: Model, side: str, x: Tensor) -> Tensor:
    c, w = model
    eps, num_heads, width = c["layer_norm_eps"], c["num_heads"], c["dim"] // c["num_heads"]
    positions = range(len(x))
    allowed = block_causal(positions, c["block_size"] if c["block_causal"] else len(x))
    turn = turns(positions, width, c["rope_theta"])

    def rotate(head: Tensor) -> Tensor:
        turned = torch.complex(head[:, : width // 2].contiguous(), head[:, width // 2 :].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), dim=1)

    def mlp(x: Tensor, block: str) -> Tensor:
        x = linear(w, f"{block}.ffn_proj", x)
        if c["act"] == "swiglu":
            value, gate = x.chunk(2, -1)
            x = value * silu(gate)
        else:
            x = silu(x) if c["act"] == "silu" else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return linear(w, f"{block}.ffn_out", x)

    for i in range(c[f"{side}_num_blocks"]):
        block = f"{side}.blocks.{i}"
        qkv = linear(w, f"{block}.qkv_proj", x if c["post_norm"] else affine_norm(w, f"{block}.norm_attn", x, eps))
        if c["clip_qkv"] is not None:
            qkv = qkv.clamp(-c["clip_qkv"], c["clip_qkv"])
        shared = c["dim"] // c["shared_heads_kv"]
        q, k, v = qkv.split([c["dim"], shared, shared], -1)
        if c["qk_norm"]:
            q, k = affine_norm(w, f"{block}.q_norm", q, eps), affine_norm(w, f"{block}.k_norm", k, eps)
        heads = []
        for number in range(num_heads):
            part = slice(number * width, (number + 1) * width)
            own = part if c["shared_heads_kv"] == 1 else slice(0, width)
            heads.append(attend(rotate(q[:, part]), rotate(k[:, own]), v[:, own], allowed))
        attended = linear(w, f"{block}.attn_out_proj", torch.cat(heads, 1))
        if c["post_norm"]:
            x = affine_norm(w, f"{block}.norm_attn", x, eps) + attended
            x = x + affine_norm(w, f"{block}.norm_ffn", mlp(x, block), eps)
        else:
            x = x + attended
            x = x + mlp(affine_norm(w, f"{block}.norm_ffn", x, eps), block)
    return x


def encode(model: Model, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Posterior mean and log-variance (n, d) of ids (n * P,); no log-variance for a deterministic encoder."""
    c, w = model
    patch, eps = c["patch_size"], c["layer_norm_eps"]
    embedded = w["encoder.wte.weight"][ids]
    kernel = w["encoder.patch_embedder.weight"]
    rows = []
    for start in range(0, len(ids), patch):
        rows.append(w["encoder.patch_embedder.bias"] + sum(kernel[:, :, p] @ embedded[start + p] for p in range(patch)))
    out = linear(w, "encoder.final_layer", transform(model, "encoder", torch.stack(rows)))
    if not c["use_variation"]:
        return norm(out, eps), None
    mean, logvar = out.chunk(2, -1)
    return (norm(mean, eps), logvar.clamp(-30, 20)) if c["encoder_last_ln"] else (mean, logvar)


def decode(model: Model, z: Tensor) -> Tensor:
    """Logits (n * P, V) of latents z (n, d)."""
    c, w = model
    u = linear(w, "decoder.unpatch_layer", transform(model, "decoder", linear(w, "decoder.in_layer", z.double())))
    tokens = [row[p :: c["patch_size"]] for row in u for p in range(c["patch_size"])]
    normed = affine_norm(w, "decoder.final_norm", torch.stack(tokens), c["layer_norm_eps"])
    return linear(w, "decoder.final_layer", normed)


# Section 7: the training step


def packed_allowed(length: int, block_size: int) -> Tensor:
    """Who sees whom in one sample's rows [clean (L) | noisy (L)]."""

    def sees(q: int, k: int) -> bool:
        q_block, k_block = q % length // block_size, k % length // block_size
        if k < length:
            return q_block >= k_block if q < length else q_block > k_block
        return q >= length and q_block == k_block

    return torch.tensor([[sees(q, k) for k in range(2 * length)] for q in range(2 * length)])


def packed(model: Model, z0: Tensor, z_noisy: Tensor, ts_noisy: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Velocities (L, d) of the clean and of the noisy rows of one sample."""
    length = len(z0)
    rows = torch.cat((z0, z_noisy))
    times = torch.cat((torch.zeros(length), ts_noisy))
    out = dit(model, rows, times, [*range(length), *range(length)], packed_allowed(length, block_size))
    return out[:length], out[length:]
