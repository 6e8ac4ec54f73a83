"""Load and save AR models as Hugging Face Llama checkpoints: config.json and safetensors.

Not every Llama can be loaded: scaled rotary positions, biases, and heads of another width than hidden_size /
num_attention_heads are refused.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from opencola.checkpoints.configs import Values, build, check_fixed, check_type, required
from opencola.checkpoints.files import CONFIG, StoredTensors, checked, read_json, write_json, write_tensors
from opencola.checkpoints.names import Table, fill, release_views
from opencola.checkpoints.official import MAX_SHARD_BYTES
from opencola.errors import UserError
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.ranges import Count, Positive, Size

FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
}

# What a Llama's config.json could vary and our class does not.
FIXED: Values = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
HEADER: Values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def table(groups: int) -> Table:
    """Our modules -> Llama's; groups: queries for each head of keys and values, which have so much fewer rows."""
    blocks: dict[str, str | Mapping[str, int]] = {
        "norm_attention": "input_layernorm",
        "qkv": {"self_attn.q_proj": groups, "self_attn.k_proj": 1, "self_attn.v_proj": 1},
        "attention_out": "self_attn.o_proj",
        "norm_mlp": "post_attention_layernorm",
        "mlp_in": {"mlp.gate_proj": 1, "mlp.up_proj": 1},
        "mlp_out": "mlp.down_proj",
    }

    def inside(theirs: str | Mapping[str, int]) -> str | Mapping[str, int]:
        if isinstance(theirs, str):
            return f"model.layers.#.{theirs}"
        return {f"model.layers.#.{name}": share for name, share in theirs.items()}

    return {
        "embedding": "model.embed_tokens",
        **{f"trunk.blocks.#.{ours}": inside(theirs) for ours, theirs in blocks.items()},
        "trunk.final_norm": "model.norm",
        "head": "lm_head",
    }


def is_folder(folder: Path) -> bool:
    """Whether a folder is that of a Llama."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == HEADER["model_type"]


def load(folder: str | Path, dtype: torch.dtype = torch.float32, bos_id: int | None = None) -> AR:
    """Load a Llama from its folder; parameters get `dtype`.

    bos_id: in place of config.json's bos_token_id, which not every model has. Raises FileNotFoundError for what is
    missing, UserError for damaged files and for models that our class cannot be, naming file and key or tensor.
    """
    file = Path(folder) / CONFIG
    config = read_config(file.parent, bos_id)
    with torch.device("meta"):
        model = AR(config)
    stored = StoredTensors(file.parent)
    # constants that old files hold: the rotary frequencies, which rope_theta gives
    expected = {name for name in stored.files if re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\..*", name)}
    expected |= fill(model, table(config.trunk.num_heads // config.trunk.kv_heads), stored, dtype)
    if config.tied and HEAD in stored.files:  # some files hold the tied matrix twice
        expected.add(HEAD)
        embedding = model.embedding.weight
        if not torch.equal(stored.read(HEAD, embedding.shape).to(dtype), embedding):
            raise UserError(
                f"{stored.files[HEAD]}: tensor {HEAD} is not {EMBEDDING}, but {CONFIG} says tie_word_embeddings"
            )
    stored.refuse_others(expected)
    return model


def save(
    model: AR,
    folder: str | Path,
    *,
    eos_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `load` and Hugging Face's LlamaForCausalLM read, replacing the model in it.

    eos_ids: tokens that end a text, for whoever generates; dtype: of the stored weights; max_shard_bytes: size above
    which weights are split over several files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = table(model.config.trunk.num_heads // model.config.trunk.kv_heads)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors |= release_views(names, name, parameter.detach())
    write_tensors(folder, tensors, dict.fromkeys(tensors, dtype), max_shard_bytes)
    stored = {"dtype": str(dtype).removeprefix("torch."), "eos_token_id": list(eos_ids) or None}
    write_json(folder / CONFIG, write_config(model.config) | stored)


def write_config(config: ARConfig) -> Values:
    """The config.json of a Llama, without what is known only of its file."""
    trunk = config.trunk
    values = {key: getattr(trunk, name) for key, name in FIELDS.items()}
    return {
        **HEADER,
        **FIXED,
        **values,
        "num_key_value_heads": trunk.kv_heads,
        "head_dim": trunk.head_dim,
        "rope_theta": trunk.rope_base,  # transformers 4; the next line is transformers 5's
        "rope_parameters": {"rope_type": "default", "rope_theta": trunk.rope_base},
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
    }


def read_config(folder: Path, bos_id: int | None = None) -> ARConfig:
    """Read a Llama's config.json. Raises UserError naming file, key and value for what our AR cannot be."""
    file = folder / CONFIG
    values = read_json(file)
    check_type(file, values, "llama")
    check_fixed(file, values, FIXED)
    hints = get_type_hints(LlamaConfig, include_extras=True)
    fields = {name: required(file, values, key, hints[name]) for key, name in FIELDS.items()}
    fields["rope_base"] = _rope_base(file, values)
    if values.get("num_key_value_heads") is not None:
        fields["num_kv_heads"] = required(file, values, "num_key_value_heads", Count)
    trunk = build(file, LlamaConfig, fields)
    if values.get("head_dim") is not None:
        check_fixed(file, values, {"head_dim": trunk.head_dim})
    if bos_id is None:
        if values.get("bos_token_id") is None:
            raise UserError(f"{file}: bos_token_id is missing: give the id to predict the first token of a text from")
        bos_id = checked(file, "bos_token_id", values["bos_token_id"], Size)
    vocabulary = required(file, values, "vocab_size", Count)
    tied = checked(file, "tie_word_embeddings", values.get("tie_word_embeddings", False), bool)
    return build(file, ARConfig, {"vocab_size": vocabulary, "trunk": trunk, "tied": tied, "bos_id": bos_id})


def _rope_base(file: Path, values: Mapping[str, Any]) -> float:
    """The rotary base: of transformers 5, in rope_parameters, or of 4, in rope_theta."""
    base = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{file}: {key} is {rope!r}, but only unscaled rotary positions are supported")
        base = rope.get("rope_theta", base)
    return float(checked(file, "rope_theta", base, Positive))
