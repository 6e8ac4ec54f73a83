"""Configurations, tensor names and random weights of tiny models in the public format, written from its description."""

import math
from typing import Any

import torch
from torch import Tensor

DIT = {"architectures": ["ColaDiTModel"], "model_type": "cola_dit", "dtype": "float32", "patch_size": 1}
VAE = {
    "architectures": ["ColaTextVAEModel"],
    "model_type": "cola_text_vae",
    "dtype": "float32",
    "block_causal": True,
    "layer_norm_type": "layer_norm",
    "rope_full_precision": True,
    "dropout": 0.0,
    "attn_dropout": 0.0,
    "causal": False,
    "use_emb": True,
    "init_fn": "normal",
    "init_std": 0.02,
    "init_cutoff_factor": 3,
    "use_variation": True,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "configA": (
        {"txt_dim": 12, "heads": 2, "head_dim": 6, "rope_dim": 6, "num_layers": 2, "expand_ratio": 2}
        | {"txt_in_channels": 5, "norm_eps": 1e-4, "qk_bias": True, "block_size": 4},
        {"vocab_size": 29, "encoder_num_blocks": 1, "decoder_num_blocks": 2, "dim": 12, "ffn_dim": 20, "num_heads": 3}
        | {"latent_dim": 5, "patch_size": 1, "shared_heads_kv": 3, "encoder_last_ln": False, "layer_norm_eps": 1e-5}
        | {"layer_norm_affine": False, "post_norm": False, "qk_bias": True, "qk_norm": True, "qk_norm_affine": False}
        | {"clip_qkv": 1.5, "rope_theta": 100, "bias": False, "act": "gelu", "block_size": 2}
        | {"scaling_factor": 0.8, "shifting_factor": 0.1},
    ),
    "configB": (
        {"txt_dim": 10, "heads": 3, "head_dim": 4, "rope_dim": 2, "num_layers": 1, "expand_ratio": 4}
        | {"txt_in_channels": 4, "norm_eps": 1e-3, "qk_bias": False, "block_size": 4},
        {"vocab_size": 31, "encoder_num_blocks": 2, "decoder_num_blocks": 1, "dim": 16, "ffn_dim": 24, "num_heads": 2}
        | {"latent_dim": 4, "patch_size": 2, "shared_heads_kv": 1, "encoder_last_ln": True, "layer_norm_eps": 1e-3}
        | {"layer_norm_affine": True, "post_norm": True, "qk_bias": False, "qk_norm": True, "qk_norm_affine": True}
        | {"clip_qkv": None, "rope_theta": 500000, "bias": True, "act": "swiglu", "block_size": 1}
        | {"scaling_factor": 1.0, "shifting_factor": 0.0},
    ),
}


def dit_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Section 2.1 of the format."""
    width, inner, d = c["txt_dim"], c["heads"] * c["head_dim"], c["txt_in_channels"]
    linears = {"txt_in.proj": (width, d), "emb_in.proj_in": (width, 256), "txt_out.proj": (d, width)}
    linears |= {
        "emb_in.proj_hid": (width, width),
        "emb_in.proj_out": (width, width),
        "txt_out_ada.out_in.1": (2 * width, width),
    }
    norms = {"txt_out_norm": width}
    for i in range(c["num_layers"]):
        b = f"blocks.{i}"
        linears |= {f"{b}.msa.proj_qkv": (3 * inner, width), f"{b}.msa.proj_out": (width, inner)}
        linears |= {
            f"{b}.mlp.proj_in": (c["expand_ratio"] * width, width),
            f"{b}.mlp.proj_out": (width, c["expand_ratio"] * width),
        }
        linears |= {f"{b}.ada.{part}_in.1": (2 * width, width) for part in ("msa", "mlp")}
        linears |= {f"{b}.ada.{part}_out.1": (width, width) for part in ("msa", "mlp")}
        norms |= {f"{b}.msa.norm_q": c["head_dim"], f"{b}.msa.norm_k": c["head_dim"]}
    shapes = _with_biases(linears, norms)
    return {
        name: shape for name, shape in shapes.items() if c["qk_bias"] or ".msa.proj_" not in name or "weight" in name
    }


def vae_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Section 2.2 of the format."""
    width, patch, d, ffn = c["dim"], c["patch_size"], c["latent_dim"], c["ffn_dim"]
    shared = width // c["shared_heads_kv"]
    linears = {
        "encoder.final_layer": ((1 + c["use_variation"]) * d, width),
        "decoder.in_layer": (width, d),
        "decoder.final_layer": (c["vocab_size"], width),
    }
    norms = {"decoder.final_norm": width}
    biased = {"encoder.patch_embedder": (width, width, patch), "decoder.unpatch_layer": (patch * width, width)}
    qkv: dict[str, tuple[int, ...]] = {}
    for side in ("encoder", "decoder"):
        for i in range(c[f"{side}_num_blocks"]):
            b = f"{side}.blocks.{i}"
            qkv[f"{b}.qkv_proj"] = (width + 2 * shared, width)
            inner = ffn // 2 if c["act"] == "swiglu" else ffn
            linears |= {
                f"{b}.attn_out_proj": (width, width),
                f"{b}.ffn_proj": (ffn, width),
                f"{b}.ffn_out": (width, inner),
            }
            norms[f"{b}.norm_ffn"] = width
            norms |= {f"{b}.norm_attn": width} if c["layer_norm_affine"] else {}
            norms |= {f"{b}.q_norm": width, f"{b}.k_norm": shared} if c["qk_norm_affine"] else {}
    shapes = {"encoder.wte.weight": (c["vocab_size"] + 1, width)} | _with_biases(biased, norms)
    for group, bias in ((linears, c["bias"]), (qkv, c["qk_bias"])):
        shapes |= {name: shape for name, shape in _with_biases(group, {}).items() if bias or name.endswith("weight")}
    return shapes


def _with_biases(linears: dict[str, tuple[int, ...]], norms: dict[str, int]) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return shapes | {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}


def random_weights(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Noise that leaves no path dead: norm gains around 1, gates around 0.4."""
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            # float32 phases carry rounding of 3e-5, which the time embedding must not magnify
            scale = 0.6 if "emb_in" in name else 1.3
            weights[name] = noise if "wte" in name else scale * noise / math.sqrt(noise[0].numel())
        else:
            centre = 0.4 if "_out.1.bias" in name else 1.0 if "norm" in name and "weight" in name else 0.0
            weights[name] = centre + 0.2 * noise
    return weights
