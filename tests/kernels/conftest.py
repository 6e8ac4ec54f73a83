"""What the tests of kernels share."""

from collections.abc import Iterator

import pytest
import torch

from opencola.kernels import elementwise


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test with one thread and with two, which share few numbers, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(elementwise, "SMALL", 0)
    yield
    torch.set_num_threads(before)
