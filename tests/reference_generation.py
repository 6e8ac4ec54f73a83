"""The release's generation (sections 5 and 6 of the format), second implementation: see reference.py."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference import Config, Model, decode, dit_after, encode
from torch import Tensor


def penalise(logits: Tensor, written: Sequence[int], penalty: float) -> Tensor:
    """Logits (R, V) after the repetition penalty."""
    logits = logits.clone()
    for token in set(written):
        for row in logits:
            row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
    return logits


def probabilities(row: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution (V,) that a token is drawn from, given its penalised logits (V,)."""
    scaled = {token: value / temperature for token, value in enumerate(row.double().tolist())}
    if top_k > 0:
        smallest = sorted(scaled.values(), reverse=True)[:top_k][-1]
        scaled = {token: value for token, value in scaled.items() if value >= smallest}
    if 0 < top_p < 1:
        top = max(scaled.values())
        total = sum(math.exp(value - top) for value in scaled.values())
        mass, kept = 0.0, {}
        for token, value in sorted(scaled.items(), key=lambda item: -item[1]):
            if mass > top_p:
                break
            kept[token] = value
            mass += math.exp(value - top) / total
        scaled = kept
    top = max(scaled.values())
    result = torch.zeros(len(row)).double()
    for token, value in scaled.items():
        result[token] = math.exp(value - top)
    return result / result.sum()


def generate(
    dit_model: Model,
    vae_model: Model,
    prompts: Sequence[Sequence[int]],
    noise: Callable[[int, int], Tensor],
    args: Config,
) -> dict[str, Any]:
    """Greedy generation of a batch; noise(step, row) is (b, d).

    args: timestep_num, guidance_scale, max_new_tokens, repetition_penalty, pad_id, stop_ids, bf16_times.
    Gives `output_ids` per prompt and, with leading axes (steps, B): `final_latents`, `logits_raw`, `logits_penalised`,
    `block_ids`.
    """
    size, patch, num = dit_model[0]["block_size"], vae_model[0]["patch_size"], args["timestep_num"]
    committed, pinned, trim = [], [], []
    for prompt in prompts:
        padded = list(prompt) + [args["pad_id"]] * (-len(prompt) % (size * patch))
        mean = encode(vae_model, torch.tensor(padded))[0]
        z = (mean - vae_model[0]["shifting_factor"]) * vae_model[0]["scaling_factor"]
        known = math.ceil(len(prompt) / patch)
        prefix = size * (known // size)
        committed.append(z[:prefix])
        pinned.append(z[prefix:known])
        trim.append(len(prompt) - prefix * patch if known > prefix else 0)
    latents = list(committed)  # the decoder's history
    written: list[list[int]] = [[] for _ in prompts]
    record: dict[str, list[Tensor]] = {"final_latents": [], "logits_raw": [], "logits_penalised": [], "block_ids": []}
    short = any(len(rows) and args["max_new_tokens"] < size - len(rows) for rows in pinned)
    ended, step = [False] * len(prompts), 0
    while True:
        blocks = []
        for i in range(len(prompts)):
            fixed = pinned[i] if step == 0 else pinned[i][:0]
            x = noise(step, i).double().clone()
            x[: len(fixed)] = fixed
            guidance = 1.0 if len(committed[i]) == 0 else args["guidance_scale"]
            for j in range(num):
                t = 1000 * (1 - j / num)
                times = torch.full((size,), t).double()
                if args["bf16_times"]:
                    times = times.bfloat16().double()
                times[: len(fixed)] = 0
                conditional = dit_after(dit_model, committed[i], x, times)
                unconditional = dit_after(dit_model, x[:0], x, times)
                x = x - (guidance * (conditional - unconditional) + unconditional) / num
                x[: len(fixed)] = fixed
            latents[i] = torch.cat((latents[i], x))
            raw = decode(vae_model, latents[i])[-size * patch :]
            logits = raw if step == 0 else penalise(raw, written[i], args["repetition_penalty"])
            blocks.append((x, raw, logits, logits.argmax(-1)))
        for i, block in enumerate(blocks):
            written[i] += block[3].tolist()
            ended[i] = ended[i] or bool(set(written[i]) & set(args["stop_ids"]))
            committed[i] = latents[i]
        for name, values in zip(record, zip(*blocks, strict=True), strict=True):
            record[name].append(torch.stack(values))
        step += 1
        if all(ended) or short or step * size * patch >= args["max_new_tokens"]:
            break
    outputs = [tokens[cut:] for tokens, cut in zip(written, trim, strict=True)]
    return {"output_ids": outputs, **{name: torch.stack(values) for name, values in record.items()}}
