"""Hugging Face Llama checkpoints: the same logits in both directions, and damage that is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomise
from torch import Tensor
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from opencola.checkpoints import llama
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling

TOKENS = torch.tensor([[1, 7, 3, 3, 29, 0, 12], [5, 5, 2, 8, 14, 20, 6]])
KINDS = [(tied, kv_heads) for tied in (False, True) for kv_heads in (4, 2, 1)]


def theirs(tied: bool = False, kv_heads: int = 2, **fields: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TheirConfig(
        vocab_size=30, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rms_norm_eps=1e-4, **sizes | fields
    )
    model = randomise(LlamaForCausalLM(config)).float().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight or not tied
    return model


def ours(tied: bool = False, kv_heads: int | None = 2, **fields: Any) -> AR:
    sizes = {"width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": kv_heads, "ffn_dim": 40, "norm_eps": 1e-4}
    return randomise(AR(ARConfig(30, LlamaConfig(**sizes | fields), tied, bos_id=4))).float()


@torch.no_grad()
def assert_same(model: AR, other: LlamaForCausalLM) -> None:
    expected = other(TOKENS).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model.logits(TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tied", "kv_heads"), KINDS)
def test_their_checkpoints_give_the_same_logits(tied: bool, kv_heads: int, tmp_path: Path) -> None:
    other = theirs(tied, kv_heads, rope_theta=500.0, bos_token_id=9)
    other.save_pretrained(tmp_path)
    model = llama.load(tmp_path)
    assert (model.config.tied, model.config.trunk.num_kv_heads, model.config.bos_id) == (tied, kv_heads, 9)
    assert model.config.trunk.rope_base == other.config.to_dict()["rope_parameters"]["rope_theta"] == 500
    assert_same(model, other)


@pytest.mark.parametrize(("tied", "kv_heads"), KINDS)
def test_ours_give_the_same_logits(tied: bool, kv_heads: int, tmp_path: Path) -> None:
    model = ours(tied, kv_heads, rope_base=77.0)
    llama.save(model, tmp_path, eos_ids=[4], max_shard_bytes=9000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    other, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (other.config.bos_token_id, other.config.eos_token_id) == (4, [4])
    assert_same(model, other)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 77  # of transformers 4 and 5
    assert llama.load(tmp_path).config == model.config
    assert_same(llama.load(tmp_path), other)


def test_generation_is_theirs(tmp_path: Path) -> None:
    model = ours()
    llama.save(model, tmp_path)
    other = LlamaForCausalLM.from_pretrained(tmp_path)
    prompt = [7, 3, 20]
    new = [block.tokens[0] for (block,) in model.generate([prompt], ARSampling(max_new_tokens=15))]
    inputs = torch.tensor([[4, *prompt]])
    found = other.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=15, do_sample=False)
    assert found[0, 4:].tolist() == new


def test_half_precision_is_stored_as_asked(tmp_path: Path) -> None:
    model = ours().bfloat16()
    llama.save(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    found = llama.load(tmp_path, torch.bfloat16)
    for name, value in model.state_dict().items():
        assert found.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(found.state_dict()[name], value), name


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_configs_of_older_versions_and_defaults(tmp_path: Path) -> None:
    model = ours(kv_heads=None)
    llama.save(model, tmp_path)

    def older(values: dict[str, Any]) -> None:
        for key in ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
            del values[key]
        values |= {"rope_theta": 500, "rope_scaling": None, "torch_dtype": "float16", "pretraining_tp": 1}

    change_config(tmp_path, older)
    frequencies = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_tensors(tmp_path, lambda tensors: tensors.update(frequencies))
    found = llama.load(tmp_path)
    assert found.config.trunk.rope_base == 500
    assert found.config.trunk.kv_heads == 4
    assert_same(found, LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_model_without_a_first_token_needs_one(tmp_path: Path) -> None:
    llama.save(ours(), tmp_path)
    change_config(tmp_path, lambda values: values.update(bos_token_id=None))
    with pytest.raises(ValueError, match="config.json: bos_token_id is missing: give"):
        llama.load(tmp_path)
    assert llama.load(tmp_path, bos_id=7).config.bos_id == 7


def test_a_tied_matrix_may_be_stored_twice_but_not_be_two(tmp_path: Path) -> None:
    model = ours(tied=True)
    llama.save(model, tmp_path)
    embedding = model.embedding.weight.detach()
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(llama.load(tmp_path).logits(TOKENS), model.logits(TOKENS))
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="model.safetensors: tensor lm_head.weight is not model.embed_tokens.weight"):
        llama.load(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 2.0}
PROJECTION = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling is {'type': 'linear', 'factor': 2.0}, but"),
        ("rope_parameters", LINEAR, "rope_parameters is {'rope_type': 'linear', 'factor': 2.0}, but only unscaled"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "rope_parameters is {'partial_rotary_factor': 0.5}, but"),
        ("rope_parameters", [1], "rope_parameters is \\[1\\], but only unscaled"),
        ("rope_parameters", {"rope_theta": "1"}, "rope_theta is '1', but must be a number"),
        ("attention_bias", True, "attention_bias is True, but only False is supported"),
        ("mlp_bias", True, "mlp_bias is True, but only False is supported"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', but only 'silu' is supported"),
        ("quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}, but only None"),
        ("model_type", "mistral", "model_type is 'mistral', but a llama is wanted here"),
        ("head_dim", 16, "head_dim is 16, but only 8 is supported"),
        ("hidden_size", "32", "hidden_size is '32', but must be a whole number"),
        ("hidden_size", 30, "width 30 must be a multiple of"),
        ("num_key_value_heads", 3, "num_kv_heads 3 must divide num_heads 4"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0, but must be at least 1"),
        ("bos_token_id", [1], "bos_token_id is \\[1\\], but must be a whole number"),
        ("bos_token_id", 30, "bos_id 30 is outside 0..29"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no', but must be true or false"),
    ],
)
def test_what_our_class_cannot_be_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    llama.save(ours(), tmp_path)
    change_config(tmp_path, lambda values: values.update({key: value}))
    with pytest.raises(ValueError, match=f"config.json: {message}") as caught:
        llama.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "rms_norm_eps", "vocab_size"])
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    llama.save(ours(), tmp_path)
    change_config(tmp_path, lambda values: values.pop(key))
    with pytest.raises(ValueError, match=f"config.json: {key} is missing"):
        llama.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(PROJECTION), f"tensor {PROJECTION} is missing"),
        (lambda tensors: tensors.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (
            lambda tensors: tensors.update({PROJECTION: torch.zeros(32, 32)}),
            f"tensor {PROJECTION} has shape \\[32, 32\\], but config.json gives it \\[16, 32\\]",
        ),
        (
            lambda tensors: tensors.update({PROJECTION: torch.zeros(16, 32, dtype=torch.int8)}),
            f"tensor {PROJECTION} has dtype torch.int8",
        ),
    ],
)
def test_damaged_weights_are_named(change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    llama.save(ours(), tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=f"model.safetensors: {message}") as caught:
        llama.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        llama.load(tmp_path)
    llama.save(ours(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor"):
        llama.load(tmp_path)
