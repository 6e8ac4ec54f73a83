"""Runs of a model's generation that remember every block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from opencola.models.cola import generate as generation
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.models.stopping import Text, TokenBlock


@dataclass
class Run:
    """What a run gave out, and what it did inside."""

    blocks: list[list[TokenBlock]] = field(default_factory=list)
    latents: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (id, block) -> (S, d)
    ids: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # the same -> decoded tokens
    seen: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # the same -> what the penalty counts
    rows: list[int] = field(default_factory=list)  # samples in each call of the DiT

    @property
    def tokens(self) -> list[list[int]]:
        """All new tokens of each sample."""
        return [[t for blocks in self.blocks for b in blocks if b.sample == i for t in b.tokens] for i in self.samples]

    @property
    def reasons(self) -> list[str]:
        """Why each sample ended."""
        return ["".join(b.finished for blocks in self.blocks for b in blocks if b.sample == i) for i in self.samples]

    @property
    def samples(self) -> range:
        """Places in the list of prompts."""
        return range(len(self.blocks[0]))


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """generate(model, prompts, ids=..., other arguments of Cola.generate..., fields of ColaSampling...) -> Run."""
    write_block = generation.write_block

    def run(model: Cola, prompts: Sequence[Sequence[int]], **fields: Any) -> Run:
        result = Run()

        def recorded(vae: Any, dit: Any, caches: Any, block: Any, texts: Sequence[Text], *rest: Any) -> Any:
            out = write_block(vae, dit, caches, block, texts, *rest)
            for place, text in enumerate(texts):
                key = text.id, text.blocks
                result.latents[key], result.ids[key] = out[0][place], out[1][place].tolist()
                result.seen[key] = text.tokens
            return out

        monkeypatch.setattr(generation, "write_block", recorded)
        hook = model.dit.register_forward_pre_hook(lambda module, args: result.rows.append(len(args[0])))
        names = ("eos_ids", "pad_id", "ids", "stop", "watch", "noise")
        rest = {name: fields.pop(name) for name in names if name in fields}
        sampling = ColaSampling(**{"steps": 3, "guidance": 3.0, "max_new_tokens": 10} | fields)
        result.blocks += list(model.generate(prompts, sampling, **rest))
        hook.remove()
        return result

    return run


@pytest.fixture(scope="session")
def exact_blas() -> bool:
    """Whether this machine's matrix products have the same bits for a row among 4 rows or 48, and with more zeros.

    Where they have not, nothing in float64 can be the same bit for bit.
    """
    torch.manual_seed(0)
    x, w = torch.randn(48, 16).double(), torch.randn(24, 16).double()
    rows = all(torch.equal(torch.nn.functional.linear(x[:n], w), (x @ w.T)[:n]) for n in range(4, 48, 4))
    zeros = torch.cat((torch.randn(4, 48).double(), torch.zeros(4, 48).double()), dim=1)
    v = torch.randn(96, 8).double()
    return rows and torch.equal(zeros @ v, zeros[:, :48] @ v[:48])
