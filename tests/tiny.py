"""Tiny float64 models with random weights everywhere, and the slow dense pass that fast ones are compared with."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencola.data.batch import Batch
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.layers.attention import masked
from opencola.layers.llama import LlamaConfig
from opencola.layers.masks import block_causal, dense
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.vae.objective import VAEObjective
from opencola.vae.text_vae import ReleaseConventions, TextVAE, TextVAEConfig

VOCABULARY = 30
CONVENTIONS = {field.name for field in dataclasses.fields(ReleaseConventions)}


def randomise(model: nn.Module) -> Any:
    """The model in float64 with every parameter random, so that nothing is zero or one by design.

    Matrices keep the size of what passes through, so that what comes out depends on what goes in.
    """
    torch.manual_seed(1)
    model = model.double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def vae_config(**fields: Any) -> TextVAEConfig:
    """Two layers of width 16, four channels; fields of the configuration, and of its conventions of the release."""
    sizes = {"latent_dim": 4, "width": 16, "ffn_dim": 24, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
    release = ReleaseConventions(**{name: fields.pop(name) for name in [*fields] if name in CONVENTIONS})
    return TextVAEConfig(**{"vocab_size": VOCABULARY, "release": release} | sizes | fields)


def dit_config(**fields: Any) -> DiTConfig:
    """Two layers of width 16, four channels, blocks of four."""
    sizes = {"latent_dim": 4, "width": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "expansion": 2}
    return DiTConfig(**sizes | {"rope_dim": 6, "block_size": 4} | fields)


def tiny_vae(**fields: Any) -> TextVAE:
    """A Text VAE."""
    return randomise(TextVAE(vae_config(**fields)))


def tiny_dit(**fields: Any) -> BlockCausalDiT:
    """A DiT."""
    return randomise(BlockCausalDiT(dit_config(**fields)))


def tiny_cola(
    vae: dict[str, Any] | None = None,
    dit: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    **prior: Any,
) -> Cola:
    """A whole model; further fields are the prior's objective."""
    parts = (vae_config(**vae or {}), dit_config(**dit or {}), VAEObjective(**objective or {}), PriorObjective(**prior))
    return randomise(Cola(ColaConfig(*parts)))


def tiny_llada(**fields: Any) -> LLaDA:
    """Two layers of width 16."""
    trunk = LlamaConfig(width=16, num_layers=2, num_heads=2, ffn_dim=24)
    config = LLaDAConfig(**{"vocab_size": VOCABULARY, "trunk": trunk} | fields)
    return randomise(LLaDA(config))


def tiny_batch(size: int = 3, length: int = 12, step: int = 0, seed: int = 5) -> Batch:
    """Random tokens."""
    torch.manual_seed(2)
    ids = torch.tensor([7, 100, 3, 12, 9, 55][:size])
    return Batch(torch.randint(VOCABULARY, (size, length)), ids, seed, step)


def one_block(dit: BlockCausalDiT, history: Tensor, z: Tensor, times: Tensor) -> Tensor:
    """Velocity (S, d) of one sample's block z (S, d) at row times (S,), after a clean history (R, d), R whole blocks.

    Everything from nothing, under a dense block-causal mask. With a trunk R is any number.
    """
    if dit.config.trunk_layers:
        place, num_clean = torch.arange(len(history) + len(z)), len(history)
        turn, modulation = dit.turns(place), dit.modulation(torch.cat((times.new_zeros(num_clean), times)))
        h = dit.latent_in(history[None])
        for layer in range(dit.config.trunk_layers if num_clean else 0):
            causal = masked(dense(block_causal(1), num_clean, num_clean))
            h = dit.blocks[layer](h, layer, modulation[layer], place[None, :num_clean], turn[:num_clean], causal)
        last = F.layer_norm(h[:, -1:], h.shape[-1:], eps=dit.config.norm_eps) if num_clean else h.new_zeros(1, 1, 16)
        rows, index = dit.latent_in(z[None]) + last @ dit.context_in.weight.T, place[None]
        for layer in range(dit.config.trunk_layers, dit.config.num_layers):
            everything = torch.cat((h if num_clean else rows[:, :0], rows), dim=1)
            out = dit.blocks[layer](everything, layer, modulation[layer], index, turn, masked(None))
            rows = out[:, num_clean:]
        shift, scale = modulation[-1][num_clean:].chunk(2, dim=-1)
        return dit.velocity_out(dit.final_norm(rows[0]) * (1 + scale) + shift)
    rows = torch.cat((history, z))[None]
    modulation = dit.modulation(torch.cat((torch.zeros(len(history)).to(times), times)))
    place = torch.arange(len(history) + len(z))
    mask = dense(block_causal(dit.config.block_size), len(place), len(place))
    return dit(rows, modulation, place[None], dit.turns(place), masked(mask))[0, len(history) :]
