"""Whole generations give what the official implementation gives: ids exactly, latents and logits closely."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opencola.models.cola import generate as generation
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling
from opencola.models.sampling import choose, penalise, probabilities

TOLERANCE: dict[str, Any] = {"atol": 2e-4, "rtol": 0}


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_probabilities(stored, meta, case: str) -> None:
    expected, settings = stored("sampling"), meta["sampling"][case]
    logits = penalise(expected["logits"], expected["generated_ids"].tolist(), [settings["repetition_penalty"]] * 2)
    found = probabilities(logits, ColaSampling(**settings))
    assert_close(found, expected[f"probs_{case}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_greedy_choice(stored, penalty: float, generator) -> None:
    expected = stored("sampling")
    logits = penalise(expected["logits"], expected["generated_ids"].tolist(), [penalty] * 2)
    ids = choose(logits, [ColaSampling(temperature=0.0)] * 2, [generator(0), generator(1)])
    assert torch.equal(ids, expected[f"greedy_rp{penalty}"])


@dataclass
class Run:
    """One call of `generate`, seen from inside; blocks are lists over steps."""

    ids: list[list[int]] = field(default_factory=list)  # given out, per prompt
    finished: list[str] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # (B, S, d)
    tokens: list[Tensor] = field(default_factory=list)  # (B, S * P), known ones included
    penalised: list[Tensor] = field(default_factory=list)  # (B, S * P, V), from the second block on
    raw: list[Tensor] = field(default_factory=list)


def sampling(meta: dict[str, Any], **changes: Any) -> ColaSampling:
    """The fixtures' arguments as our settings."""
    arguments = meta["generate"]
    settings = {
        "steps": arguments["timestep_num"],
        "guidance": arguments["guidance_scale"],
        "max_new_tokens": arguments["max_new_tokens"],
        "temperature": arguments["temperature"],
        "repetition_penalty": arguments["repetition_penalty"],
        "seed": arguments["base_noise_seed"],
        "compatibility": "release",
    }
    return ColaSampling(**(settings | changes))


@pytest.fixture
def run(cola: Cola, meta, stored, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Generate for some of the fixtures' prompts, with their noise, and record what happens."""
    write_block, penalise_block = generation.write_block, generation.penalise
    expected = stored("generate")

    def call(
        settings: ColaSampling, *, prompts: Sequence[int] = (0, 1, 2), eos_ids: Sequence[int] = (), seeded: bool = False
    ) -> Run:
        result = Run([[] for _ in prompts], [""] * len(prompts))

        def recorded_block(*arguments: Any) -> tuple[Tensor, Tensor, Any, Any]:
            written = write_block(*arguments)
            result.latents.append(written[0])
            result.tokens.append(written[1])
            return written

        def recorded_penalty(logits: Tensor, seen: Any, penalty: Sequence[float]) -> Tensor:
            result.raw.append(logits)
            result.penalised.append(penalise_block(logits, seen, penalty))
            return result.penalised[-1]

        monkeypatch.setattr(generation, "write_block", recorded_block)
        monkeypatch.setattr(generation, "penalise", recorded_penalty)
        blocks: Iterator[Any] = cola.generate(
            [expected[f"prompt_ids_{row}"].tolist() for row in prompts],
            settings,
            eos_ids=eos_ids,
            pad_id=meta["pad_token_id"],
            ids=[meta["generate"]["sample_ids"][row] for row in prompts] if seeded else prompts,
            noise=None if seeded else lambda row, block: expected["noise"][block, row],
        )
        for block in blocks:
            for out in block:
                result.ids[out.sample] += out.tokens
                result.finished[out.sample] = out.finished
        return result

    return call


@pytest.mark.parametrize("seeded", [False, True], ids=["given noise", "own noise"])
def test_generation(run, stored, meta, seeded: bool) -> None:
    expected = stored("generate")
    result = run(sampling(meta), seeded=seeded)
    assert result.ids == meta["generate"]["output_ids"]
    assert result.finished == ["length"] * 3
    assert torch.equal(torch.stack(result.tokens), expected["block_ids"])
    assert_close(torch.stack(result.latents), expected["final_latents"], **TOLERANCE)
    assert_close(torch.stack(result.raw), expected["logits_raw"][1:], **TOLERANCE)
    assert_close(torch.stack(result.penalised), expected["logits_penalised"][1:], **TOLERANCE)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_each_prompt_alone(run, stored, meta, row: int) -> None:
    """The batch that a prompt is in changes nothing."""
    result = run(sampling(meta), prompts=[row])
    assert result.ids == [meta["generate"]["output_ids"][row]]
    assert_close(torch.stack(result.latents)[:, 0], stored("generate")["final_latents"][:, row], **TOLERANCE)


def test_bf16_times(run, stored, meta) -> None:
    expected = stored("generate_bf16_timesteps")
    result = run(sampling(meta, bf16_times=True))
    assert result.ids == meta["generate_bf16_timesteps"]["output_ids"]
    assert torch.equal(torch.stack(result.tokens), expected["block_ids"])
    assert_close(torch.stack(result.latents), expected["final_latents"], **TOLERANCE)
    exact = stored("generate")["final_latents"]
    assert (exact - expected["final_latents"]).abs().max() > 1e-3, "rounding should show"


def test_stop_at_eos(run, meta) -> None:
    expected = meta["generate_eos"]
    solo = run(sampling(meta), prompts=[expected["solo_prompt_index"]], eos_ids=[expected["eos_token_id"]])
    assert solo.ids == [expected["solo_output_ids"]]
    assert len(solo.tokens) == expected["solo_steps"]
    batch = run(sampling(meta), eos_ids=[expected["eos_token_id"]])
    assert batch.ids == expected["batched_with_im_end_token_id"]["output_ids"]
    assert len(batch.tokens) == expected["batched_with_im_end_token_id"]["steps"]


def test_smallest_budget(run, meta) -> None:
    expected = meta["generate_force_complete"]
    result = run(sampling(meta, max_new_tokens=expected["max_new_tokens"]))
    assert result.ids == expected["output_ids"]
    assert len(result.tokens) == 1


def test_neither_guidance_nor_penalty(run, meta) -> None:
    expected = meta["generate_cfg1_rp1"]
    settings = sampling(meta, guidance=expected["guidance_scale"], repetition_penalty=expected["repetition_penalty"])
    result = run(settings)
    assert result.ids == expected["output_ids"]
    assert result.ids != meta["generate"]["output_ids"]
