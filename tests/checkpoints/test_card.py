"""The card says what is known of a model, in a form that the Hub reads."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from opencola.checkpoints import card, official
from opencola.checkpoints.settings import save_sampling
from opencola.flow.dit import DiTConfig
from opencola.models.cola.model import Cola
from opencola.models.cola.parts import ColaConfig, PriorObjective
from opencola.models.cola.sampling import ColaSampling
from opencola.text.tokenizer import Tokenizer
from opencola.vae.text_vae import TextVAEConfig

STAGE: dict[str, Any] = {
    "name": "vae",
    "command": "opencola train x --data.source 'hf:a/b:c@d'",
    "recipe": {"data": {"source": "hf:a/b:c@d", "length": 8}, "valid": "hf:e@valid", "seed": 0},
    "final": {"step": 1234, "tokens": 5678900, "seconds": 61.0, "loss": 0.51234, "loss/kl": -0.25, "vae_logsnr": None},
    "validation": {"batches": 50, "loss": 0.75, "loss/kl": -0.125},
    "num_parameters": 1_500_000,
    "made_with": {"opencola": "9.9", "git": "abc-dirty", "torch": "2", "python": "3"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a whole model in it."""
    tokenizer = Tokenizer.train(["a fox"], 260)
    vae = TextVAEConfig(tokenizer.vocab_size, latent_dim=4, width=16, ffn_dim=24, num_heads=2)
    dit = DiTConfig(latent_dim=4, width=16, num_layers=3, num_heads=1, head_dim=16, rope_dim=8, block_size=2)
    torch.manual_seed(0)
    folder = tmp_path / "small-model"
    cola = Cola(ColaConfig(vae, dit, prior=PriorObjective(lambda_ref=0)))
    official.save(cola, folder, tokenizer)
    save_sampling(ColaSampling(guidance=2.25, stop=("|",)), folder)
    return folder


def rows_of(text: str) -> list[list[str]]:
    """Cells of all tables' rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")] for line in lines]


def test_it_tells_all_that_is_known(model: Path) -> None:
    prior = copy.deepcopy(STAGE) | {"name": "prior", "command": "opencola train x --stage prior", "validation": None}
    prior["recipe"]["data"]["source"] = ["a|b.txt", "hf:second"]
    card.write_facts(model, {"stages": [STAGE, prior]})
    card.write(model)
    found = ModelCard.load(model / "README.md")
    data = found.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "opencola"
    assert data["pipeline_tag"] == "text-generation" and "cola-dlm" in data["tags"]
    assert data["datasets"] == ["a/b", "e", "second"]
    text = found.text
    assert "# small-model" in text
    table = rows_of(text)
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in
              official.load(model).named_children()}  # fmt: skip
    assert ["prior", f"{counts['dit']:.2f} M", "3 layers of width 16, block size 2"] in table
    assert any(row[:2] == ["Text VAE", f"{counts['vae']:.2f} M"] for row in table)
    assert ["vae", "`hf:a/b:c@d`", "1,234", "5,678,900", "61 s", "1.50 M"] in table
    assert any("a¦b.txt" in row[1] and "hf:second" in row[1] for row in table if row[0] == "prior")
    assert ["vae", "loss", "0.5123", "0.75"] in table and ["vae", "kl", "-0.25", "-0.125"] in table
    assert ["prior", "loss", "0.5123", ""] in table
    assert f"```\n{STAGE['command']}\nopencola train x --stage prior\n```" in text
    assert text.count("Made with opencola 9.9 at commit abc-dirty, torch 2, Python 3.") == 1
    assert "`guidance 2.25`" in text and '`stop ["|"]`' in text and "solver" not in text
    assert "## Evaluation" not in text and "follows no instructions" in text


def test_measures_of_a_demo_are_told_and_kept(model: Path) -> None:
    measures = {"legal_sentences": 0.98765, "vae_logsnr": 3.0, "counts": {"legal_sentences": 600, "vae_logsnr": 7},
                "intervals": {"legal_sentences": [0.9, 0.99]}, "seconds": 1.0}  # fmt: skip
    (model / "metrics.json").write_text(json.dumps(measures))
    card.write(model)
    facts = card.read_facts(model)
    assert facts["evaluation"]["legal_sentences"] == {"value": 0.98765, "cases": 600, "interval": [0.9, 0.99]}
    (model / "metrics.json").unlink()
    card.write_facts(model, facts)
    assert card.read_facts(model) == facts
    before = (model / "README.md").read_text()
    assert ["legal sentences", "0.9877", "0.9–0.99", "600"] in rows_of(before)
    assert ["vae logsnr", "3", "", "7"] in rows_of(before)
    card.write(model)
    assert (model / "README.md").read_text() == before


def test_a_vae_alone_and_another_licence(model: Path) -> None:
    for file in (model / official.DIT_FOLDER).iterdir():
        file.unlink()
    (model / official.DIT_FOLDER).rmdir()
    card.write(model, "cc-by-4.0")
    found = ModelCard.load(model / "README.md")
    assert found.data.license == "cc-by-4.0" and found.data.pipeline_tag is None
    assert "## Training" not in found.text and "load_vae" in found.text and "## Sampling" not in found.text


def test_a_readme_of_somebody_else_stays(model: Path) -> None:
    for text in ("# Notes\n\nMine.\n", "---\nlibrary_name: other\n---\n# Mine\n", "---\nnot: [closed\n---\n", ""):
        (model / "README.md").write_text(text)
        card.write(model)
        assert (model / "README.md").read_text() == text
    (model / "README.md").write_text("---\nlibrary_name: opencola\n---\n# Old\n")
    card.write(model)
    assert "# small-model" in (model / "README.md").read_text()
