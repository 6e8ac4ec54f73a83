"""Release folders that cannot be read: one line names the file and what is wrong with it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opencola.checkpoints import llama, official, parts
from opencola.flow.dit import BlockCausalDiT, DiTConfig

DIT = DiTConfig(latent_dim=4, width=8, num_layers=2, num_heads=2, head_dim=4, rope_dim=2)

# Any small model of the release's making.
OWN = Path(__file__).resolve().parent.parent / "golden" / "configB"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A release folder to damage."""
    shutil.copytree(OWN, tmp_path / "release")
    return tmp_path / "release"


def set_key(part: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / part / "config.json"
        values = json.loads(file.read_text())
        values[key] = value
        file.write_text(json.dumps(values))

    return change


def drop_key(part: str, key: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / part / "config.json"
        values = json.loads(file.read_text())
        del values[key]
        file.write_text(json.dumps(values))

    return change


def set_tensor(part: str, name: str, value: Tensor | None) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / part / "model.safetensors"
        tensors = load_file(file)
        tensors.pop(name, None)
        save_file(tensors if value is None else tensors | {name: value}, file)

    return change


def truncate(part: str, size: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / part / "model.safetensors", size)


def write(path: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / path).write_text(text)

    return change


def delete(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (set_key("cola_dit", "patch_size", 2), "cola_dit/config.json: patch_size is 2, but only 1 is supported"),
    (set_key("cola_dit", "emb_dim", 32), "cola_dit/config.json: emb_dim is 32, but only 10"),
    (set_key("cola_dit", "txt_out_channels", 5), "cola_dit/config.json: txt_out_channels is 5, but only 4"),
    (set_key("cola_dit", "rope_dim", 6), "cola_dit/config.json: dit.rope_dim 6 must be"),
    (set_key("cola_dit", "heads", "3"), "cola_dit/config.json: heads is '3', but must be a whole number"),
    (set_key("cola_dit", "heads", 0), "cola_dit/config.json: heads is 0, but must be at least 1"),
    (set_key("cola_dit", "norm_eps", float("nan")), "cola_dit/config.json: norm_eps is nan, but must be a number"),
    (set_key("cola_dit", "qk_bias", 1), "cola_dit/config.json: qk_bias is 1, but must be true or false"),
    (set_key("cola_dit", "model_type", "cola_text_vae"), "cola_dit/config.json: model_type is 'cola_text_vae'"),
    (
        set_key("cola_vae", "shared_heads_kv", 4),
        "cola_vae/config.json: shared_heads_kv is 4, but must be 1 or num_heads, 2",
    ),
    (
        set_key("cola_vae", "layer_norm_type", "rms"),
        "cola_vae/config.json: layer_norm_type is 'rms', but only 'layer_norm'",
    ),
    (set_key("cola_vae", "rope_full_precision", False), "cola_vae/config.json: rope_full_precision is False"),
    (set_key("cola_vae", "dropout", 0.1), "cola_vae/config.json: dropout is 0.1, but only 0.0"),
    (set_key("cola_vae", "attn_dropout", 0.1), "cola_vae/config.json: attn_dropout is 0.1"),
    (
        set_key("cola_vae", "act", "relu"),
        "cola_vae/config.json: act is 'relu', but must be one of 'swiglu', 'gelu', 'silu'",
    ),
    (set_key("cola_vae", "clip_qkv", "8"), "cola_vae/config.json: clip_qkv is '8', but must be a number"),
    (set_key("cola_vae", "dim", 15), "cola_vae/config.json: vae.width 15 must be"),
    (drop_key("cola_vae", "latent_dim"), "cola_vae/config.json: latent_dim is missing"),
    (write("cola_vae/config.json", '{"vocab_size": 3,\n}'), "cola_vae/config.json, line 2: not valid JSON"),
    (write("cola_vae/config.json", "[1]"), "cola_vae/config.json: expected a JSON object, found list"),
    (
        set_key("cola_dit", "num_layers", 2),
        "cola_dit/model.safetensors: tensor blocks.1.msa.rope.rope.freqs is missing",
    ),
    (
        set_key("cola_vae", "bias", False),
        "cola_vae/model.safetensors: unexpected tensor decoder.blocks.0.attn_out_proj.bias",
    ),
    (
        set_tensor("cola_dit", "txt_out.proj.bias", torch.zeros(3)),
        "cola_dit/model.safetensors: tensor txt_out.proj.bias has shape \\[3\\], but config.json gives it \\[4\\]",
    ),
    (
        set_tensor("cola_dit", "blocks.0.ada.mlp_in.1.weight", None),
        "cola_dit/model.safetensors: tensor blocks.0.ada.mlp_in.1.weight is missing",
    ),
    (set_tensor("cola_dit", "extra", torch.zeros(1)), "cola_dit/model.safetensors: unexpected tensor extra"),
    (
        set_tensor("cola_dit", "txt_out.proj.bias", torch.zeros(4, dtype=torch.int8)),
        "tensor txt_out.proj.bias has dtype torch.int8",
    ),
    (
        set_tensor("cola_dit", "blocks.0.msa.rope.rope.freqs", torch.tensor([0.5])),
        "tensor blocks.0.msa.rope.rope.freqs is not 10000",
    ),
    (truncate("cola_vae", 3000), "cola_vae/model.safetensors is damaged"),
    (truncate("cola_vae", 0), "cola_vae/model.safetensors is damaged"),
    (write("cola_vae/model.safetensors", "<html>Not found</html>"), "cola_vae/model.safetensors is damaged"),
    (delete("cola_vae/model.safetensors"), "cola_vae holds neither model.safetensors nor model.safetensors.index.json"),
    (
        delete("cola_vae/config.json"),
        "release holds no config.json, cola_dlm/cola_vae/config.json or cola_vae/config.json",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damaged_models_are_named(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    official.load(copy)
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        official.load(copy)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_each_other(copy: Path) -> None:
    set_key("cola_vae", "block_size", 3)(copy)
    with pytest.raises(ValueError, match="release: .*block_size 3.*block_size 4"):
        official.load(copy)


def test_keys_of_others_are_ignored(copy: Path) -> None:
    expected = official.load(copy)
    for part in ("cola_dit", "cola_vae"):
        for key, value in {"transformers_version": "9", "torch_dtype": "float16", "causal": True, "new": [1]}.items():
            set_key(part, key, value)(copy)
    found = official.load(copy)
    assert found.config == expected.config
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "index.json: weight_map must say"),
        (lambda index: index["weight_map"].clear(), "index.json: weight_map must say"),
        (
            lambda index: index["weight_map"].update({"txt_in.proj.bias": "../x"}),
            "txt_in.proj.bias is said to be outside",
        ),
        (
            lambda index: index["weight_map"].update({"txt_in.proj.bias": "x"}),
            "x is missing, but .* tensor txt_in.proj.bias",
        ),
        (lambda index: index["weight_map"].pop("txt_in.proj.bias"), "index.json: tensor txt_in.proj.bias is missing"),
        (
            lambda index: index["weight_map"].update({"new": "model-00001-of-00003.safetensors"}),
            "model-00001-of-00003.safetensors holds no tensor new",
        ),
    ],
)
def test_damaged_indexes_are_named(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    official.save_dit(BlockCausalDiT(DIT), tmp_path, max_shard_bytes=9000)
    assert len(list(tmp_path.iterdir())) == 5
    index = json.loads((tmp_path / INDEX).read_text())
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        official.load_dit(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_incomplete_download_is_named(tmp_path: Path) -> None:
    official.save_dit(BlockCausalDiT(DIT), tmp_path, max_shard_bytes=9000)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is missing, but"):
        official.load_dit(tmp_path)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_model_of_another_type_is_told_what_can_be_loaded(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for load in (parts.load, llama.load):
        with pytest.raises(ValueError, match=rf"config.json: model_type is '{kind}', .* what can be loaded .*, llama,"):
            load(tmp_path)
