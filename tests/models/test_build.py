"""Every family has a configuration that builds a model with a loss."""

import pytest
import torch

from opencola.data.batch import Batch
from opencola.models import build
from opencola.models.sampling import Sampling


@pytest.mark.parametrize("family", build.FAMILIES)
def test_every_family_trains(family: str) -> None:
    config = build.config_class(family)()
    model = build.build(config)
    assert model.config == config
    batch = Batch(torch.randint(0, 1024, (2, 16)), torch.arange(2), seed=0, step=0)
    loss = model.loss(batch)
    loss.total.backward()
    assert loss.total.isfinite()
    torch.testing.assert_close(sum(loss.terms.values()), loss.total)


def test_every_family_has_its_own_settings_of_generation() -> None:
    common = set(Sampling.hints())
    own = {family: set(build.sampling_class(family).hints()) - common for family in build.FAMILIES}
    assert own["vae"] == own["cola"] > {"solver", "guidance_every", "compatibility", "first_block"}
    assert own["ar"] == set()
    assert own["llada"] == {"steps", "block_length", "remasking", "guidance"}
    assert own["plaid"] == {"steps", "shift", "guidance"}
    assert set.union(common, *own.values()) == build.SETTINGS
    guidance = {family: build.sampling_class(family)().guidance for family in ("cola", "llada", "plaid")}  # type: ignore[union-attr]
    assert guidance == {"cola": 7.0, "llada": 1.0, "plaid": 1.0}


@pytest.mark.parametrize(
    ("family", "setting"), [("ar", "steps"), ("llada", "solver"), ("plaid", "block_length"), ("cola", "remasking")]
)
def test_settings_of_others_are_refused(family: str, setting: str) -> None:
    with pytest.raises(TypeError, match=setting):
        build.sampling_class(family)(**{setting: 1})


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="no model family 'gpt'; the families are: vae, cola, ar, llada, plaid$"):
        build.sampling_class("gpt")
    with pytest.raises(ValueError, match="no model family 'gpt'; the families are: vae, cola, ar, llada, plaid$"):
        build.config_class("gpt")
