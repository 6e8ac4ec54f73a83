"""Generation against a slow one written here: no caches, no batches, everything from the whole sequence each time."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, one_block, tiny_cola
from torch import Tensor, nn

from opencola.layers import randomness
from opencola.layers.few_rows import FewRowsBlock, PackedLinear
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling

S, D = 4, 4
LENGTHS = (0, 2, 4, 7, 15)  # nothing; inside the first block; whole; inside the second; long
Generate = Callable[..., Any]


def prompt(length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def noise(seed: int, sample: int, block: int, candidate: int = 0) -> Tensor:
    return torch.randn(S, D, generator=randomness.generator(seed, "noise", sample, block, candidate)).double()


@torch.no_grad()
def by_hand(
    model: Cola,
    text: list[int],
    sample: int,
    num_blocks: int,
    guidance: float,
    steps: int = 2,
    every: int = 1,
    until: float = 0.0,
) -> tuple[list[Tensor], list[list[int]], int]:
    """Latents and tokens of each block, and how many tokens of the first one are the prompt's."""
    vae, dit, patch = model.vae, model.dit, model.vae.config.patch_size
    whole, grid = len(text) // patch, 1 if model.dit.config.trunk_layers else S
    z = torch.zeros(0, D).double()
    if whole:
        z = vae.normalise(vae.encode(torch.tensor([text[: whole * patch]])).mean)[0]
    sequence, fixed = z[: whole - whole % grid], z[whole - whole % grid :]
    latents, tokens, known = [], [], len(text) - len(sequence) * patch
    for number in range(num_blocks):
        x = noise(0, sample, number)
        x[: len(fixed)] = fixed
        for step in range(steps):
            times = torch.full((S,), 1 - step / steps, dtype=torch.float64)
            times[: len(fixed)] = 0
            conditional, alone = (one_block(dit, history, x, times) for history in (sequence, sequence[:0]))
            if step % every == 0:
                difference = conditional - alone
            scale = guidance if len(sequence) and 1 - step / steps >= until else 1.0
            x = x - (conditional + (scale - 1) * difference) / steps
            x[: len(fixed)] = fixed
        sequence, fixed = torch.cat((sequence, x)), fixed[:0]
        logits = vae.decode(vae.denormalise(sequence)[None])[0, -S * patch :]
        latents.append(x)
        tokens.append(logits.argmax(-1).tolist())
    return latents, tokens, known


TRUNK = {"trunk_layers": 2, "num_layers": 3}
VAES: dict[str, dict[str, Any]] = {
    "causal": {},
    "block_causal": {"attention": "block_causal", "block_size": 4},
    "patches of two": {"patch_size": 2},
    "no encoder blocks": {"encoder_layers": 0},
    "shifted": {"latent_shift": 0.3, "latent_scale": 1.7, "attention": "block_causal", "block_size": 2},
}


CASES = [(vae, {}) for vae in VAES.values()] + [(VAES[name], TRUNK) for name in ("causal", "patches of two")]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("vae", "dit"), CASES, ids=[*VAES, "trunk", "trunk, patches of two"])
def test_cached_batches_equal_uncached_samples(
    generate: Generate, vae: dict[str, Any], dit: dict[str, Any], guidance: float
) -> None:
    model, patch = tiny_cola(vae=vae, dit=dit), vae.get("patch_size", 1)
    prompts = [prompt(length) for length in (*LENGTHS, 16 * patch + 1)]
    ids = [40, 3, 77, 5, 9, 10]
    run = generate(model, prompts, guidance=guidance, max_new_tokens=11 * patch, ids=ids, steps=2)
    distinct = set()
    for place, (text, number) in enumerate(zip(prompts, ids, strict=True)):
        latents, tokens, known = by_hand(model, text, number, 4, guidance)
        new = [token for block in tokens for token in block][known:]
        assert run.tokens[place] == new[: 11 * patch]
        for block in range(3):
            torch.testing.assert_close(run.latents[number, block], latents[block], rtol=1e-8, atol=1e-9)
        distinct.update(new)
    assert len(distinct) > 3 and set(run.reasons) == {"length"}


@pytest.mark.parametrize("patch", [1, 2])
def test_the_budget_is_cut_exactly_in_new_tokens(generate: Generate, patch: int) -> None:
    model, prompts = tiny_cola(vae={"patch_size": patch}), [prompt(length) for length in LENGTHS]
    full = generate(model, prompts, max_new_tokens=20, steps=1).tokens
    for budget in range(1, 21):
        run = generate(model, prompts, max_new_tokens=budget, steps=1)
        assert run.tokens == [tokens[:budget] for tokens in full]
        assert all(len(tokens) == budget for tokens in run.tokens) and run.reasons == ["length"] * 5


def test_end_of_text_is_cut_and_not_given_out(generate: Generate) -> None:
    model, prompts = tiny_cola(), [prompt(length) for length in LENGTHS]
    free = generate(model, prompts, max_new_tokens=20).tokens
    eos = free[2][6]
    run = generate(model, prompts, max_new_tokens=20, eos_ids=[eos])
    for tokens, found, reason in zip(free, run.tokens, run.reasons, strict=True):
        assert (found, reason) == ((tokens[: tokens.index(eos)], "eos") if eos in tokens else (tokens, "length"))
    assert "eos" in run.reasons
    assert generate(model, prompts, max_new_tokens=20, eos_ids=[eos], ignore_eos=True).tokens == free


def test_a_stop_rule_ends_its_sample_alone(generate: Generate) -> None:
    model, prompts = tiny_cola(), [prompt(length) for length in LENGTHS]
    free = generate(model, prompts, max_new_tokens=20).tokens
    seen: list[list[int]] = []

    def stop(sample: int, tokens: list[int]) -> int | None:
        if sample == 3:
            seen.append(list(tokens))
        return 6 if sample == 3 and len(tokens) >= 6 else None

    run = generate(model, prompts, max_new_tokens=20, stop=stop)
    assert run.tokens == [*free[:3], free[3][:6], free[4]]
    assert run.reasons == ["length", "length", "length", "stop", "length"]
    assert seen == [free[3][:1], free[3][:5], free[3][:9]]  # prompt of 7: one new token in the first block


def test_blocks_are_given_out_as_they_are_ready() -> None:
    model, calls = tiny_cola(), []
    model.dit.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    stream = model.generate([prompt(7), prompt(4)], ColaSampling(steps=3, max_new_tokens=9))
    assert calls == []  # nothing before it is asked for
    sizes = []
    for blocks in stream:
        sizes.append([len(block.tokens) for block in blocks])
        assert len(calls) == 1 + 3 * len(sizes) + (len(sizes) - 1)  # prefill, steps, commits
    assert sizes == [[1, 4], [4, 4], [4, 1]]


def test_guidance_of_one_has_no_unconditional_rows(generate: Generate) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    assert generate(tiny_cola(), prompts, guidance=1.0).rows[:8] == [5] * 8  # prefill, block, commit, block
    guided = generate(tiny_cola(), prompts, guidance=2.0).rows
    assert guided[:4] == [5, 10, 10, 10]  # prefill, then both branches
    without = generate(tiny_cola(), [prompt(0), prompt(3)], guidance=2.0).rows
    assert without[:4] == [2, 2, 2, 2]  # no history, no guidance: three steps, then the commit
    assert without[4:7] == [4, 4, 4]


def test_nothing_is_committed_after_the_last_block(generate: Generate) -> None:
    run = generate(tiny_cola(), [prompt(8), prompt(1)], guidance=1.0, max_new_tokens=8)
    assert run.rows == [2] + [2] * 3 + [2] + [2] * 3 + [1] + [1] * 3  # prefill, block, commit, block, commit, block
    assert generate(tiny_cola(), [prompt(1)], guidance=1.0, max_new_tokens=3).rows == [1] * 3  # nothing to prefill


def test_finished_samples_leave_the_batch(generate: Generate) -> None:
    prompts = [prompt(4), prompt(8), prompt(12)]
    stop = {0: 1, 1: 9, 2: 5}
    run = generate(
        tiny_cola(),
        prompts,
        guidance=1.0,
        max_new_tokens=99,
        stop=lambda sample, tokens: stop[sample] if len(tokens) >= stop[sample] else None,
    )
    assert [[block.sample for block in blocks] for blocks in run.blocks] == [[0, 1, 2], [1, 2], [1]]
    assert run.rows == [3] + [3] * 3 + [2] + [2] * 3 + [1] + [1] * 3
    alone = generate(tiny_cola(), prompts[1:2], ids=[1], guidance=1.0, max_new_tokens=9)
    assert run.tokens[1] == alone.tokens[0]


@pytest.mark.parametrize("candidates", [1, 2])
def test_the_states_of_a_watched_text(generate: Generate, candidates: int) -> None:
    """Are those of the candidate that is kept; to look changes nothing."""
    settings: dict[str, Any] = {"steps": 4, "max_new_tokens": 5, "candidates": candidates}
    run = generate(tiny_cola(), [prompt(7), prompt(4)], watch=True, **settings)
    assert len(run.blocks) == 2
    for number, blocks in enumerate(run.blocks):
        for i, block in enumerate(blocks):
            assert [state.time for state in block.states] == [0.75, 0.5, 0.25, 0.0]
            assert block.states[-1].tokens == run.ids[i, number]
            assert torch.equal(block.states[-1].latents, run.latents[i, number])
            assert not torch.equal(block.states[0].latents, block.states[-1].latents)
            assert all(len(state.tokens) == len(state.margins) == S for state in block.states)
            assert all(0 <= margin <= 1 for state in block.states for margin in state.margins)
    unwatched = generate(tiny_cola(), [prompt(7), prompt(4)], **settings)
    assert unwatched.tokens == run.tokens
    assert not any(block.states for blocks in unwatched.blocks for block in blocks)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "stochastic", "adaptive"])
def test_known_latents_stay_pinned_and_their_tokens_are_not_given_back(generate: Generate, solver: str) -> None:
    model, text = tiny_cola(), prompt(7)
    inputs: list[tuple[Tensor, Tensor]] = []
    model.dit.register_forward_pre_hook(lambda module, args: inputs.append((args[0], args[2])))
    run = generate(model, [text], solver=solver, guidance=1.0, max_new_tokens=2, tolerance=0.1)
    mean = model.vae.encode(torch.tensor([text])).mean[0]
    steps = list(itertools.takewhile(lambda call: call[1].numel() > 1, inputs[1:]))  # prefill, steps, commit, ...
    assert len(steps) >= 3
    for z, index in steps:
        torch.testing.assert_close(z[0, :3], mean[4:7], rtol=0, atol=1e-11)
        assert (index > 0).tolist() == [[False, False, False, True]]  # known rows at time 0
    torch.testing.assert_close(run.latents[0, 0][:3], mean[4:7], rtol=0, atol=1e-11)
    assert [len(b.tokens) for (b,) in run.blocks] == [1, 1]
    assert run.tokens[0][0] == run.ids[0, 0][3]


def test_a_known_token_of_a_partial_patch_is_forced_and_not_given_out(generate: Generate) -> None:
    model, text = tiny_cola(vae={"patch_size": 2}), prompt(11)  # one block of 8, one patch, and a token of the next
    run = generate(model, [text], max_new_tokens=13)
    mean = model.vae.normalise(model.vae.encode(torch.tensor([text[:10]])).mean)[0]
    torch.testing.assert_close(run.latents[0, 0][:1], mean[4:], rtol=0, atol=1e-11)  # its latent is generated
    assert [len(b.tokens) for (b,) in run.blocks] == [5, 8]
    assert run.tokens[0] == run.ids[0, 0][3:] + run.ids[0, 1]
    assert run.seen[0, 1] == text + run.ids[0, 0][3:]
    assert run.ids[0, 0][2] != text[10]  # what the latent says, and what is overruled


def test_generation_in_float32_has_packed_weights(monkeypatch: pytest.MonkeyPatch, with_kernels: bool) -> None:
    model, kind = tiny_cola().float(), FewRowsBlock if with_kernels else PackedLinear
    made: list[nn.Module] = []
    init = kind.__init__

    def count(self: nn.Module, *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(kind, "__init__", count)
    texts, settings = [prompt(7), prompt(4)], ColaSampling(max_new_tokens=12, steps=2)
    fast = [[out.tokens for out in blocks] for blocks in model.generate(texts, settings)]
    number = (1 if with_kernels else 4) * len(model.dit.blocks)  # qkv, attention_out, mlp_in, mlp_out
    assert len(made) == number
    monkeypatch.setattr("opencola.layers.few_rows.PACKED_BYTES", 0)
    assert [[out.tokens for out in blocks] for blocks in model.generate(texts, settings)] == fast
    assert len(made) == number


@pytest.mark.parametrize("patch", [1, 2])
def test_padding_strategies_generate_after_the_padded_prompt(generate: Generate, patch: int) -> None:
    model, text, pad = tiny_cola(vae={"patch_size": patch}), prompt(4 * patch + 1), 17
    fill = [pad] * (4 * patch - 1)
    left = generate(model, [text, prompt(0)], first_block="left_pad", pad_id=pad).tokens
    right = generate(model, [text, prompt(0)], first_block="right_pad", pad_id=pad).tokens
    assert left == generate(model, [fill + text, prompt(0)]).tokens
    assert right == generate(model, [text + fill, prompt(0)]).tokens
    clean = generate(model, [text, prompt(0)]).tokens
    assert left[0] != right[0] != clean[0] != left[0] and left[1] == right[1] == clean[1]


def test_partial_repaint_moves_known_rows_along_and_gives_the_same_tokens_out(generate: Generate) -> None:
    model, text = tiny_cola(), prompt(7)
    inputs: list[tuple[Tensor, list[Tensor]]] = []
    model.dit.register_forward_pre_hook(lambda module, args: inputs.append((args[0], args[1])))
    settings = {"steps": 4, "guidance": 1.0, "max_new_tokens": 5, "repaint_fraction": 0.5, "repaint_repeats": 2}
    partial = generate(model, [text], first_block="partial", **settings)
    mean, calls = model.vae.encode(torch.tensor([text])).mean[0], inputs[1:7]
    for (z, modulation), step, key in zip(calls, (0, 0, 1, 1), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=False):
        t, drawn = 1 - step / 4, randomness.generator(0, "repaint", 0, 0, 0, *key, 0)
        known = (1 - t) * mean[4:7] + t * torch.randn(S, D, generator=drawn).double()[:3]
        torch.testing.assert_close(z[0, :3], known, rtol=0, atol=1e-11)
        for rows, expected in zip(modulation, model.dit.modulation(torch.tensor([t]).double()), strict=True):
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-11)  # every row at the current time
    assert len({tuple(z.flatten().tolist()) for z, _ in calls}) == 6  # then two steps without the known rows
    clean = generate(model, [text], **settings)
    assert [len(b.tokens) for (b,) in partial.blocks] == [len(b.tokens) for (b,) in clean.blocks] == [1, 4]
    assert not torch.equal(partial.latents[0, 0], clean.latents[0, 0])


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_the_candidate_with_the_smallest_round_trip_error_is_kept(generate: Generate, patch: int) -> None:
    model, count, ids = tiny_cola(vae={"patch_size": patch, "latent_scale": 1.3}), 6, [6, 2, 31]
    vae, text, budget = model.vae, prompt(4 * patch), 12 * patch
    run = generate(model, [text] * 3, candidates=count, max_new_tokens=budget, ids=ids)
    assert set(run.rows[1:4]) == {3 * 2 * count}
    for sample in ids:
        best: list[int] = []
        for block in range(3):  # all candidates of a block side by side, after the best ones of those before
            each = generate(
                model,
                [text] * count,
                max_new_tokens=budget,
                noise=lambda i, b, best=best, sample=sample: noise(0, sample, b, best[b] if b < len(best) else i),
            )
            z = torch.stack([each.latents[candidate, block] for candidate in range(count)])
            tokens = [text + [t for b in range(block + 1) for t in each.ids[c, b]] for c in range(count)]
            mean = vae.normalise(vae.encode(torch.tensor(tokens)).mean)[:, -S:]
            best.append(int((z - mean).square().sum((1, 2)).argmin()))
            torch.testing.assert_close(run.latents[sample, block], z[best[-1]], rtol=0, atol=1e-9)
        assert set(best) != {0}


def test_seeds_decide(generate: Generate) -> None:
    model, prompts = tiny_cola(), [prompt(3), prompt(9)]
    settings: dict[str, Any] = {"solver": "stochastic", "temperature": 1.0}
    first, again = (generate(model, prompts, seed=4, **settings) for _ in range(2))
    assert first.tokens == again.tokens
    assert all(torch.equal(z, again.latents[key]) for key, z in first.latents.items())
    for other in ({"seed": 5}, {"seed": 4, "ids": [2, 3]}):
        assert generate(model, prompts, **settings | other).tokens != first.tokens
    twins = generate(model, [prompt(3)] * 2, ids=[8, 8])
    assert twins.tokens[0] == twins.tokens[1]


def test_bad_prompts_are_refused_and_no_prompts_give_nothing() -> None:
    model = tiny_cola()
    for bad in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=f"prompt 1 has a token id outside 0..{VOCABULARY - 1}"):
            next(model.generate([[1], [2, bad]], ColaSampling()))
    assert list(model.generate([], ColaSampling())) == []


def test_a_model_in_bfloat16_writes_nearly_the_same_latents(generate: Generate) -> None:
    model = tiny_cola()
    exact = generate(model, [prompt(7)], max_new_tokens=4, steps=2)
    rounded = generate(model.to(torch.bfloat16), [prompt(7)], max_new_tokens=4, steps=2)
    error = (rounded.latents[0, 0].double() - exact.latents[0, 0]).square().mean().sqrt()
    assert 0 < error < 0.05 * exact.latents[0, 0].square().mean().sqrt()


@pytest.mark.parametrize(("every", "until"), [(2, 0.0), (3, 0.0), (1, 0.6), (2, 0.5)])
def test_guidance_now_and_then(generate: Generate, every: int, until: float) -> None:
    model, texts = tiny_cola(), [prompt(length) for length in (3, 4, 9)]
    settings = {"guidance_every": every, "guidance_until": until, "guidance": 3.0, "steps": 4}
    run, plain = generate(model, texts, **settings), generate(model, texts, guidance=3.0, steps=4)
    for sample, text in enumerate(texts):
        latents, _, _ = by_hand(model, text, sample, 2, 3.0, 4, every, until)
        for block in range(2):
            torch.testing.assert_close(run.latents[sample, block], latents[block], rtol=1e-8, atol=1e-9)
    assert not torch.equal(run.latents[1, 0], plain.latents[1, 0])
    outside = generate(model, texts, guidance=3.0, guidance_from=0.5, guidance_until=0.51)
    assert outside.tokens == generate(model, texts, guidance=1.0).tokens


def test_a_shifted_grid_is_followed(generate: Generate) -> None:
    run = generate(tiny_cola(), [prompt(4)], steps=4, shift=3.0, max_new_tokens=4, watch=True)
    assert [state.time for state in run.blocks[0][0].states] == pytest.approx([0.9, 0.75, 0.5, 0])
