"""Our parameters and the public release's tensors: one rename table a model (official-format §2)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opencola.checkpoints.files import StoredTensors

# Module of ours -> module of the release; weights and biases move together. A fused module of ours is several of
# theirs, one below the other, each with its share of the rows. `#` is a layer's number.
Table = Mapping[str, str | Mapping[str, int]]

DIT: Table = {
    "latent_in": "txt_in.proj",
    "time_embedding.mlp_in": "emb_in.proj_in",
    "time_embedding.mlp_hidden": "emb_in.proj_hid",
    "time_embedding.mlp_out": "emb_in.proj_out",
    "blocks.#.qkv": "blocks.#.msa.proj_qkv",
    "blocks.#.norm_q": "blocks.#.msa.norm_q",
    "blocks.#.norm_k": "blocks.#.msa.norm_k",
    "blocks.#.attention_out": "blocks.#.msa.proj_out",
    "blocks.#.mlp_in": "blocks.#.mlp.proj_in",
    "blocks.#.mlp_out": "blocks.#.mlp.proj_out",
    "blocks.#.modulation": {
        "blocks.#.ada.msa_in.1": 2,
        "blocks.#.ada.msa_out.1": 1,
        "blocks.#.ada.mlp_in.1": 2,
        "blocks.#.ada.mlp_out.1": 1,
    },
    "final_norm": "txt_out_norm",
    "final_modulation": "txt_out_ada.out_in.1",
    "velocity_out": "txt_out.proj",
    # ours: the release has no trunk
    "context_in": "context_in",
    "next_token": "next_token",
    "next_token.out": "next_token.out",
}

_VAE_BLOCK = {
    "norm_attention": "norm_attn",
    "qkv": "qkv_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "attention_out": "attn_out_proj",
    "norm_mlp": "norm_ffn",
    "mlp_in": "ffn_proj",
    "mlp_out": "ffn_out",
}

VAE: Table = {
    "embedding": "encoder.wte",
    "patch": "encoder.patch_embedder",
    **{f"encoder.#.{ours}": f"encoder.blocks.#.{theirs}" for ours, theirs in _VAE_BLOCK.items()},
    "posterior": "encoder.final_layer",
    "decoder_in": "decoder.in_layer",
    **{f"decoder.#.{ours}": f"decoder.blocks.#.{theirs}" for ours, theirs in _VAE_BLOCK.items()},
    "unpatch": "decoder.unpatch_layer",
    "final_norm": "decoder.final_norm",
    "head": "decoder.final_layer",
}


def release_views(table: Table, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The release's tensors inside our parameter (or gradient) `name`, as views by the release's names.

    Writing into the views fills `tensor`, so this one function serves both directions.
    """
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    layer = number[1] if number else ""
    entry = table[re.sub(r"\.\d+\.", ".#.", module)]
    shares = {entry: 1} if isinstance(entry, str) else entry
    rows = tensor.shape[0] // sum(shares.values())
    names = [f"{theirs.replace('#', layer)}.{kind}" for theirs in shares]
    views = dict(zip(names, tensor.split([rows * share for share in shares.values()]), strict=True))
    if name == "patch.weight":  # a strided convolution (out, in, P) that we write as a matrix product
        views = {theirs: view.unflatten(1, (len(view), -1)) for theirs, view in views.items()}
    return views


def fill(model: nn.Module, table: Table, stored: StoredTensors, dtype: torch.dtype) -> set[str]:
    """Give a model on the meta device its stored parameters, one at a time, as `dtype`; the release's names of them."""
    state: dict[str, Tensor] = {}
    read: set[str] = set()
    for name, parameter in model.named_parameters():
        state[name] = torch.empty(parameter.shape, dtype=dtype)
        for release_name, view in release_views(table, name, state[name]).items():
            view.copy_(stored.read(release_name, view.shape))
            read.add(release_name)
    model.load_state_dict(state, assign=True)
    return read


def rotary_frequencies(num_layers: int, rope_dim: int) -> dict[str, Tensor]:
    """The release's persistent rotary buffers, constants that its loader asks for: 10000^(-2j / rope_dim)."""
    frequencies = 1 / 10000 ** (torch.arange(0, rope_dim, 2).float() / rope_dim)
    return {f"blocks.{layer}.msa.rope.rope.freqs": frequencies.clone() for layer in range(num_layers)}
