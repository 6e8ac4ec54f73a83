"""Models go to disk and come back unchanged, and what cannot be read is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import vae_config
from torch import Tensor

from opencola.checkpoints import official
from opencola.checkpoints.settings import load_sampling, save_sampling
from opencola.flow.dit import BlockCausalDiT, DiTConfig
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig
from opencola.models.cola.sampling import ColaSampling
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAE, TextVAEConfig

SIZES = {"vocab_size": 17, "latent_dim": 4, "width": 8, "ffn_dim": 12, "num_heads": 2, "encoder_layers": 1}
VAE = TextVAEConfig(**SIZES, decoder_layers=2)
DIT = DiTConfig(latent_dim=4, width=8, num_layers=2, num_heads=2, head_dim=4, rope_dim=2)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name]), name


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Round trips


@pytest.mark.parametrize("part", ["cola_dit", "cola_vae"])
def test_official_files_come_back_bit_for_bit(folder: Path, part: str, tmp_path: Path) -> None:
    if part == "cola_dit":
        official.save_dit(official.load_dit(folder / part), tmp_path)
    else:
        official.save_vae(official.load_vae(folder / part), tmp_path)
    before, after = load_file(folder / part / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    config = json.loads((folder / part / "config.json").read_text())
    config.pop("transformers_version", None)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "block_causal", "block_size": 2, "patch_size": 2},
        {"attention": "full", "multi_query": True},
        {"activation": "gelu", "post_norm": False, "bias": False, "qkv_bias": True, "clip_qkv": 3.5},
        {"qk_norm": False, "norm_affine": False, "normalise_mean": False, "latent_shift": -0.25, "latent_scale": 2.0},
        {"variational": False, "qk_norm_affine": False, "rope_theta": 100.0, "norm_eps": 1e-3, "activation": "silu"},
        {"fixed_logsnr": 1.5, "encoder_layers": 2, "decoder_layers": 1},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_vae_configurations_come_back(changes: dict[str, Any], tmp_path: Path) -> None:
    model = TextVAE(vae_config(**SIZES | {"decoder_layers": 2} | changes))
    official.save_vae(model, tmp_path)
    again = official.load_vae(tmp_path)
    assert again.config == model.config
    assert_same(again, state(model))
    written = json.loads((tmp_path / "config.json").read_text())
    assert ("fixed_logsnr" in written) == ("fixed_logsnr" in changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "expansion": 2, "block_size": 16, "rope_dim": 0},
        {"trunk_layers": 1},
        {"trunk_layers": 1, "vocab_size": 11},
    ],
)
def test_dit_configurations_come_back(changes: dict[str, Any], tmp_path: Path) -> None:
    model = BlockCausalDiT(replace(DIT, **changes))
    torch.nn.init.normal_(model.blocks[0].modulation.weight)
    official.save_dit(model, tmp_path)
    again = official.load_dit(tmp_path)
    assert again.config == model.config
    assert_same(again, state(model))
    ours = {"trunk_layers", "vocab_size"} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert ours == changes.keys() & {"trunk_layers", "vocab_size"}


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    official.save_dit(BlockCausalDiT(DIT), tmp_path)
    model = official.load_dit(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.modulation(torch.tensor([0.5]))[0].sum().backward()
    assert model.time_embedding.mlp_in.weight.grad is not None


@pytest.mark.parametrize("top", ["cola_dlm", "."])
def test_whole_release(top: str, tmp_path: Path) -> None:
    cola = Cola(ColaConfig(vae=VAE, dit=DIT))
    tokenizer = Tokenizer.train(["once upon a time"], 258)
    sampling = ColaSampling(steps=3, stop=("\n\n", "END"), first_block="left_pad", temperature=1, bf16_times=True)
    official.save(cola, tmp_path / "out", tokenizer)
    save_sampling(sampling, tmp_path / "out")
    root = tmp_path / "moved"
    shutil.copytree(tmp_path / "out", root)
    if top == ".":
        for name in ("cola_dit", "cola_vae"):
            (root / "cola_dlm" / name).rename(root / name)
    again = official.load(root)
    assert again.config == cola.config
    assert_same(again, state(cola))
    assert load_sampling(root) == sampling
    assert Tokenizer.load(root).encode("once") == tokenizer.encode("once")
    assert_same(official.load_vae(root), state(cola.vae))
    assert_same(official.load_dit(root), state(cola.dit))


def test_half_precision(tmp_path: Path) -> None:
    """Rotary buffers stay exact, and so does the dtype to load with: the public package takes both from the files."""
    cola = Cola(ColaConfig(vae=VAE, dit=replace(DIT, rope_dim=4)))
    expected = {name: value.bfloat16() for name, value in state(cola).items()}
    official.save(cola, tmp_path, dtype=torch.bfloat16)
    assert_same(official.load(tmp_path), {name: value.float() for name, value in expected.items()})
    assert_same(official.load(tmp_path, torch.bfloat16), expected)
    stored = load_file(tmp_path / official.DIT_FOLDER / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    assert dtypes.pop("blocks.1.msa.rope.rope.freqs") == torch.float32
    assert dtypes["txt_in.proj.weight"] == torch.bfloat16
    assert json.loads((tmp_path / official.DIT_FOLDER / "config.json").read_text())["dtype"] == "float32"


def test_shards(tmp_path: Path) -> None:
    model = BlockCausalDiT(DIT)
    official.save_dit(model, tmp_path, max_shard_bytes=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert files(tmp_path) == {"config.json", "model.safetensors.index.json", *shards}
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    sizes = [sum(value.nbytes for value in load_file(tmp_path / shard).values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 6000 or len(load_file(tmp_path / shard)) == 1 for size, shard in zip(sizes, shards, strict=True))
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    assert_same(official.load_dit(tmp_path), state(model))


def test_saving_over_an_older_model(tmp_path: Path) -> None:
    """No file of the older one stays, whichever of the two was in several files."""
    first, second = BlockCausalDiT(DIT), BlockCausalDiT(replace(DIT, num_layers=1))
    official.save_dit(first, tmp_path, max_shard_bytes=6000)
    official.save_dit(second, tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    assert_same(official.load_dit(tmp_path), state(second))
    official.save_dit(second, tmp_path, max_shard_bytes=6000)
    official.save_dit(first, tmp_path, max_shard_bytes=8000)
    assert_same(official.load_dit(tmp_path), state(first))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files(tmp_path) == {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}


def test_a_model_can_be_saved_where_it_was_loaded_from(tmp_path: Path) -> None:
    model = BlockCausalDiT(DIT)
    official.save_dit(model, tmp_path)
    again = official.load_dit(tmp_path)
    official.save_dit(again, tmp_path)
    assert_same(official.load_dit(tmp_path), state(model))


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    official.save_vae(TextVAE(VAE), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_an_interrupted_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockCausalDiT(DIT)
    official.save_dit(model, tmp_path)
    calls: list[str] = []

    def fail_at_second(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        calls.append(str(file))
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("opencola.checkpoints.files.save_file", fail_at_second)
    with pytest.raises(OSError, match="No space left"):
        official.save_dit(BlockCausalDiT(replace(DIT, num_layers=3)), tmp_path, max_shard_bytes=6000)
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    assert_same(official.load_dit(tmp_path), state(model))


# Sampling settings


def test_sampling_defaults(tmp_path: Path) -> None:
    assert load_sampling(tmp_path) == ColaSampling()
    (tmp_path / "opencola.json").write_text('{"sampling": {"steps": 5, "guidance": 2}}')
    assert load_sampling(tmp_path) == ColaSampling(steps=5, guidance=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sampler": {}}', "opencola.json: unknown key 'sampler'"),
        ('{"sampling": 3}', "opencola.json: sampling must be an object, not 3"),
        ('{"sampling": {"step": 3}}', "opencola.json: sampling.step is not a setting; there are: max_new_tokens"),
        ('{"sampling": {"steps": "3"}}', "opencola.json: sampling.steps is '3', but must be a whole number"),
        ('{"sampling": {"steps": true}}', "opencola.json: sampling.steps is True, but must be a whole number"),
        ('{"sampling": {"solver": "rk4"}}', "opencola.json: sampling.solver is 'rk4', but must be one of 'euler'"),
        ('{"sampling": {"stop": "x"}}', "opencola.json: sampling.stop is 'x', but must be a list of strings"),
        ('{"sampling": {"steps": 0}}', "opencola.json: sampling.steps is 0, but must be at least 1"),
        ('{"sampling": ', "opencola.json, line 1: not valid JSON"),
    ],
)
def test_wrong_sampling_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "opencola.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_sampling(tmp_path)
    assert "\n" not in str(caught.value)
