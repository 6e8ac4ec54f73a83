"""Our configurations and the release's config.json (official-format §§1.1-1.2)."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from opencola.checkpoints.files import checked
from opencola.errors import UserError
from opencola.flow.dit import DiTConfig
from opencola.ranges import Count, Finite, Size
from opencola.vae.text_vae import ReleaseConventions, TextVAEConfig

Values = dict[str, Any]
Config = TypeVar("Config")

DIT_FIELDS = {
    "txt_in_channels": "latent_dim",
    "txt_dim": "width",
    "heads": "num_heads",
    "head_dim": "head_dim",
    "expand_ratio": "expansion",
    "num_layers": "num_layers",
    "norm_eps": "norm_eps",
    "qk_bias": "attention_bias",
    "rope_dim": "rope_dim",
    "block_size": "block_size",
}

# Fields of ours, written where they are not 0; the release's loader keeps them and does nothing with them.
DIT_OWN_FIELDS = ("trunk_layers", "vocab_size")

VAE_FIELDS = {
    "vocab_size": "vocab_size",
    "encoder_num_blocks": "encoder_layers",
    "decoder_num_blocks": "decoder_layers",
    "dim": "width",
    "ffn_dim": "ffn_dim",
    "num_heads": "num_heads",
    "latent_dim": "latent_dim",
    "patch_size": "patch_size",
    "scaling_factor": "latent_scale",
    "shifting_factor": "latent_shift",
}

# The fields of ReleaseConventions.
VAE_CONVENTIONS = {
    "encoder_last_ln": "normalise_mean",
    "layer_norm_eps": "norm_eps",
    "layer_norm_affine": "norm_affine",
    "post_norm": "post_norm",
    "qk_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "qk_norm_affine": "qk_norm_affine",
    "clip_qkv": "clip_qkv",
    "rope_theta": "rope_theta",
    "bias": "bias",
    "act": "activation",
    "use_variation": "variational",
}

# What the release could vary and our classes do not.
VAE_FIXED: Values = {"layer_norm_type": "layer_norm", "rope_full_precision": True, "dropout": 0.0, "attn_dropout": 0.0}

# Written for the release's sake: nothing in its inference depends on them.
VAE_UNUSED: Values = {"causal": False, "use_emb": True, "init_fn": "normal", "init_std": 0.02, "init_cutoff_factor": 3}

LOADABLE = ("cola_text_vae", "cola_dit", "llama", "opencola_llada", "opencola_plaid")
"""The types of models there are files of that can be loaded."""

# The dtype is the one to load with. It stays float32 for weights stored in half precision, because the release's loader
# would otherwise round its rotary buffers, too.
DIT_HEADER: Values = {"architectures": ["ColaDiTModel"], "model_type": "cola_dit", "dtype": "float32"}
VAE_HEADER: Values = {"architectures": ["ColaTextVAEModel"], "model_type": "cola_text_vae", "dtype": "float32"}


def dit_to_release(config: DiTConfig) -> Values:
    """The config.json of a DiT."""
    ours = asdict(config)
    values = {key: ours[field] for key, field in DIT_FIELDS.items()}
    same = {"txt_out_channels": config.latent_dim, "emb_dim": config.width, "patch_size": 1}
    own = {field: ours[field] for field in DIT_OWN_FIELDS if ours[field]}
    return {**DIT_HEADER, **values, **same, **own}


def dit_from_release(file: Path, values: Mapping[str, Any]) -> DiTConfig:
    """Read a DiT's config.json. Raises UserError naming file, key and value for what our DiT cannot be."""
    check_type(file, values, "cola_dit")
    fields = _fields(file, values, DIT_FIELDS, DiTConfig)
    check_fixed(file, values, {"txt_out_channels": fields["latent_dim"], "emb_dim": fields["width"], "patch_size": 1})
    fields |= {field: required(file, values, field, Size) for field in DIT_OWN_FIELDS if field in values}
    return build(file, DiTConfig, fields)


def vae_to_release(config: TextVAEConfig) -> Values:
    """The config.json of a Text VAE."""
    ours = asdict(config)
    values = {key: ours[field] for key, field in VAE_FIELDS.items()}
    values |= {key: ours["release"][field] for key, field in VAE_CONVENTIONS.items()}
    values["block_causal"] = config.attention != "full"
    values["block_size"] = 1 if config.attention == "causal" else config.block_size
    values["shared_heads_kv"] = config.num_heads if config.release.multi_query else 1
    if config.fixed_logsnr is not None:  # of ours; the release's loader keeps it and does nothing with it
        values["fixed_logsnr"] = config.fixed_logsnr
    return {**VAE_HEADER, **VAE_FIXED, **VAE_UNUSED, **values}


def vae_from_release(file: Path, values: Mapping[str, Any]) -> TextVAEConfig:
    """Read a Text VAE's config.json. Raises UserError naming file, key and value for what our VAE cannot be."""
    check_type(file, values, "cola_text_vae")
    check_fixed(file, values, VAE_FIXED)
    fields = _fields(file, values, VAE_FIELDS, TextVAEConfig)
    shared = required(file, values, "shared_heads_kv", Count)
    if shared not in (1, fields["num_heads"]):
        raise UserError(f"{file}: shared_heads_kv is {shared}, but must be 1 or num_heads, {fields['num_heads']}")
    conventions = _fields(file, values, VAE_CONVENTIONS, ReleaseConventions)
    fields["release"] = ReleaseConventions(**conventions, multi_query=shared > 1)
    block_size = required(file, values, "block_size", Count)
    if not required(file, values, "block_causal", bool):
        fields |= {"attention": "full", "block_size": block_size}
    elif block_size == 1:
        fields["attention"] = "causal"
    else:
        fields |= {"attention": "block_causal", "block_size": block_size}
    if "fixed_logsnr" in values:
        fields["fixed_logsnr"] = required(file, values, "fixed_logsnr", Finite | None)
    return build(file, TextVAEConfig, fields)


def check_type(file: Path, values: Mapping[str, Any], wanted: str) -> None:
    """Raise UserError when model_type is there and another than the one wanted."""
    stored = values.get("model_type", wanted)
    if stored != wanted:
        known = "" if stored in LOADABLE else f"; what can be loaded is of type {', '.join(LOADABLE)}"
        raise UserError(f"{file}: model_type is {stored!r}, but a {wanted} is wanted here{known}")


def check_fixed(file: Path, values: Mapping[str, Any], wanted: Values) -> None:
    """Raise UserError when one of the wanted keys is there with another value."""
    for key, value in wanted.items():
        stored = values.get(key, value)
        if stored != value:
            raise UserError(f"{file}: {key} is {stored!r}, but only {value!r} is supported")


def required(file: Path, values: Mapping[str, Any], key: str, hint: Any) -> Any:
    """The value of a key, as `files.checked`. Raises UserError when it is missing, too."""
    if key not in values:
        raise UserError(f"{file}: {key} is missing")
    return checked(file, key, values[key], hint)


def _fields(file: Path, values: Mapping[str, Any], names: Mapping[str, str], config: type) -> Values:
    hints = get_type_hints(config, include_extras=True)
    return {field: required(file, values, key, hints[field]) for key, field in names.items()}


def build(file: Path, config: type[Config], fields: Values) -> Config:
    """A configuration. Its own UserError gets the file's name."""
    try:
        return config(**fields)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
