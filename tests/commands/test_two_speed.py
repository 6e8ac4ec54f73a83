"""A prior of two speeds as a user meets it: trained, resumed, distilled, checked, scored, told what it cannot do."""

import json
from pathlib import Path

import pytest
from command_line import TINY, Main

from opencola.checkpoints import hub, official

TRUNK = TINY.replace("num_layers: 1,", "num_layers: 3, trunk_layers: 2, block_size: 4,").replace(
    "prior: {strategy: joint}", "prior: {strategy: joint, lambda_ar: 1.0}"
)
DISTIL = """  few:
    family: cola
    init: prior
    model:
      dit: {latent_dim: 8, width: 16, num_layers: 3, trunk_layers: 2, num_heads: 2, head_dim: 8, rope_dim: 4}
      prior: {strategy: fixed, lambda_ref: 0, lambda_ar: 1.0, distil_steps: 2, distil_guidance: 2.0}
"""


def test_from_a_recipe_to_checked_texts(main: Main, place: Path) -> None:
    (place / "trunk.yaml").write_text(TRUNK + DISTIL, encoding="utf-8")
    code, said, error = main("train", "trunk.yaml", "--out", "runs/trunk")
    assert code == 0, error
    lines = (place / "runs/trunk/prior/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss/next_token"] for line in lines if "loss/next_token" in json.loads(line)]
    assert losses and losses[-1] < losses[0]
    few = [json.loads(line) for line in (place / "runs/trunk/few/metrics.jsonl").read_text().splitlines()]
    assert any("loss/flow_matching" in line for line in few) and not any("loss/next_token" in line for line in few)
    model, tokenizer = hub.load(Path("runs/trunk"))
    before = official.load_dit(place / "runs/trunk/prior")
    assert model.dit.config == before.config and model.dit.config.vocab_size == tokenizer.vocab_size
    assert (model.dit.blocks[0].qkv.weight == before.blocks[0].qkv.weight).all()
    assert (model.dit.blocks[2].qkv.weight != before.blocks[2].qkv.weight).any()
    write = ("generate", "--model", "runs/trunk", "--prompt", "The fox", "--max-new-tokens", "9", "--temperature", "0")
    texts = {}
    for verify in ("off", "greedy", "lossless", "typical"):
        code, texts[verify], error = main(*write, "--verify", verify, "--steps", "2")
        assert code == 0, error
    assert texts["greedy"] == texts["lossless"]
    code, texts["ranked"], error = main(*write, "--candidates", "4", "--rank", "trunk")
    assert code == 0, error
    (place / "t.txt").write_text("The fox ran.\nA hen sat.\n", encoding="utf-8")
    code, said, error = main("score", "t.txt", "--model", "runs/trunk", "--estimator", "trunk", "--jsonl", "s.jsonl")
    assert code == 0 and "exact, of the trunk" in said, error
    assert all(json.loads(line)["kind"] == "exact" for line in (place / "s.jsonl").read_text().splitlines())


def test_what_a_prior_without_a_trunk_is_told(main: Main, place: Path) -> None:
    code, _, error = main("generate", "--model", "runs/tiny", "--prompt", "The", "--verify", "greedy")
    assert code == 2 and "this prior has no trunk that predicts" in error
    (place / "t.txt").write_text("The fox ran.\n", encoding="utf-8")
    code, _, error = main("score", "t.txt", "--model", "runs/tiny", "--estimator", "trunk")
    assert code == 2 and "estimator trunk: this prior has no trunk that predicts" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("trunk_layers: 2", "trunk_layers: 3"), "dit.trunk_layers 3 leaves no layer of dit.num_layers 3"),
        (("trunk_layers: 2, ", ""), "prior.lambda_ar 1.0 is for a trunk"),
        (("decoder_layers: 1}", "decoder_layers: 1, attention: block_causal}"), "reads latents one by one"),
    ],
)
def test_recipes_that_do_not_fit_together(main: Main, place: Path, change: tuple[str, str], message: str) -> None:
    (place / "bad.yaml").write_text(TRUNK.replace(*change), encoding="utf-8")
    code, _, error = main("train", "bad.yaml", "--out", "runs/bad")
    assert code == 2 and message in error and not (place / "runs/bad").exists()
