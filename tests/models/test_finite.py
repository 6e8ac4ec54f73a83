"""Numbers that are not finite: every family names the sample and the step, and every score its text."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opencola.checkpoints.files import write_tensors
from opencola.checkpoints.parts import PARTS
from opencola.errors import NotFiniteError, UserError
from opencola.evaluation.likelihood import Pair, score_pairs, total
from opencola.flow.dit import DiTConfig
from opencola.layers.finite import is_finite
from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.ar.network import ARConfig
from opencola.models.cola.parts import ColaConfig
from opencola.models.language_model import Score
from opencola.models.llada.network import LLaDAConfig
from opencola.models.plaid.network import PlaidConfig
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAEConfig

TRUNK = LlamaConfig(width=8, num_layers=1, num_heads=2, ffn_dim=8)
VAE = TextVAEConfig(vocab_size=260, width=8, ffn_dim=8, num_heads=2, latent_dim=4, encoder_layers=1, decoder_layers=1)
DIT = DiTConfig(latent_dim=4, width=8, num_layers=1, num_heads=2, head_dim=4, rope_dim=2, block_size=4)
CONFIGS: dict[str, Any] = {
    "cola": ColaConfig(VAE, DIT),
    "ar": ARConfig(260, TRUNK),
    "llada": LLaDAConfig(260, TRUNK),
    "plaid": PlaidConfig(260, 4, TRUNK),
}
DAMAGED = {"cola": "dit.velocity_out.bias", "ar": "head.weight", "llada": "head.weight", "plaid": "head.weight"}
PLACES = {
    "cola": "sample 7, block 1: the latents are not finite at step 1: ",
    "ar": "sample 7: the logits are not finite: ",
    "llada": "sample 7, block 1, step 1: the logits are not finite: ",
    "plaid": "sample 7: the latents are not finite at step 1: ",
}
TOKENIZER = Tokenizer.train([], 260)


def damaged(family: str) -> Any:
    """A model with a NaN in it."""
    torch.manual_seed(0)
    model = build.build(CONFIGS[family]).eval()
    model.get_parameter(DAMAGED[family]).data.view(-1)[-1] = math.nan
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_names_sample_and_step(family: str) -> None:
    sampling = build.sampling_class(family)(max_new_tokens=4)
    with pytest.raises(NotFiniteError, match=PLACES[family]):
        list(damaged(family).generate([[5, 6]], sampling, ids=[7]))


def test_a_guidance_that_is_none_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="guidance must be finite, but is nan"):
        build.sampling_class("cola")(guidance=math.nan)
    sampling = build.sampling_class("cola")(max_new_tokens=4, solver="adaptive", steps=2)
    with pytest.raises(NotFiniteError, match="dopri5 finds no step: the velocity is not finite|latents are not finite"):
        list(damaged("cola").generate([[5] * 9], sampling))


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_name_the_text(family: str) -> None:
    settings, pairs = build.scoring_class(family).quick(), [Pair("", "a"), Pair("", "bc")]
    model = damaged(family).requires_grad_(False)
    with pytest.raises(NotFiniteError, match="text 4: its log-probability is "):
        list(score_pairs(model, TOKENIZER, pairs, [4, 5], settings, True))
    found = list(score_pairs(model, TOKENIZER, pairs, [4, 5], settings, True, allow_not_finite=True))
    assert [record["log_probability"] for record in found] == [None, None]
    assert [record["bits_per_byte"] for record in found] == [None, None]


def test_sums_leave_out_what_is_not_finite_and_count_it() -> None:
    record = {"log_probability": -2.0, "standard_error": 0.0, "parts": {}, "num_tokens": 2, "num_bytes": 3}
    found = total([record, record | {"log_probability": None}, record])
    assert (found["not_finite"], found["num_tokens"], found["log_probability"]) == (1, 4, -4.0)
    assert "not_finite" not in total([record])


def test_a_score_names_the_first_bad_part() -> None:
    nan = torch.tensor([1.0, math.nan])
    score = Score(nan, nan, torch.tensor([1, 1]), "bound", "", {"decoder": torch.zeros(2), "prior": nan})
    with pytest.raises(NotFiniteError, match="second: its log-probability is nan, as prior is nan: "):
        score.check_finite(["first", "second"])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loading_names_file_and_tensor(family: str, value: float, tmp_path: Path) -> None:
    model = build.build(CONFIGS[family])
    names = build.part_names(model.config)
    for part in (PARTS[name] for name in names):
        part.save(part.module(model), tmp_path)
        (file,) = tmp_path.rglob("*.safetensors")
        tensors = load_file(file)
        name = [*tensors][-1]
        tensors[name].view(-1)[-1] = value
        save_file(tensors, file)
        with pytest.raises(NotFiniteError, match=rf"model.safetensors: tensor {name} is not finite"):
            part.load(tmp_path)
        file.unlink()


def test_nothing_is_written_that_is_not_finite(tmp_path: Path) -> None:
    for value, dtype, why in ((math.nan, torch.float32, "not finite"), (1e6, torch.float16, "too large for")):
        with pytest.raises(NotFiniteError, match=f"tensor a is {why}"):
            write_tensors(tmp_path, {"a": torch.tensor([1.0, value])}, {"a": dtype}, 100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_all_types_are_looked_at(dtype: torch.dtype) -> None:
    values = torch.ones(3, 5).to(dtype)
    assert is_finite(values) and is_finite(values[:0])
    values.view(-1)[7] = math.nan
    assert not is_finite(values) and is_finite(values[:1])
