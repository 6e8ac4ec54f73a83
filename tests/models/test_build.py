"""Every family has a configuration that builds a model with a loss."""

import pytest
import torch

from opencola.data.batch import Batch
from opencola.models import build


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


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="no model family 'gpt'; the families are: vae, cola, ar, llada, plaid$"):
        build.config_class("gpt")
