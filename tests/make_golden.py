"""Write tests/golden: two tiny random models in the public format, and what the slow reference makes of them.

The folders are laid out as the golden fixtures of the official implementation are, with options that those leave at
their defaults. Run `python tests/make_golden.py`, and only when the reference or the layout changes.
"""

import json
from pathlib import Path
from typing import Any

import reference
import reference_generation
import torch
from golden_models import DIT, MODELS, VAE, dit_shapes, random_weights, vae_shapes
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "golden"
PROMPT_LENGTHS = {"configA": (3, 8, 10), "configB": (5, 8, 15)}  # 15: a pad token inside a latent that closes a block
GENERATE = {
    "configA": {"timestep_num": 16, "guidance_scale": 3.0, "max_new_tokens": 12, "repetition_penalty": 1.2},
    "configB": {"timestep_num": 12, "guidance_scale": 7.0, "max_new_tokens": 24, "repetition_penalty": 1.1},
}
SAMPLING = {
    "a": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.1},
    "b": {"temperature": 1.0, "top_k": 0, "top_p": 0.7, "repetition_penalty": 1.3},
    "c": {"temperature": 0.5, "top_k": 5, "top_p": 1.0, "repetition_penalty": 1.0},
}


def make(name: str, seed: int) -> None:
    """Write one folder."""
    generator = torch.Generator().manual_seed(seed)
    dit_config, vae_config = DIT | MODELS[name][0], VAE | MODELS[name][1]
    dit_config |= {"txt_out_channels": dit_config["txt_in_channels"], "emb_dim": dit_config["txt_dim"]}
    size, patch, d, vocab = (
        dit_config["block_size"],
        vae_config["patch_size"],
        vae_config["latent_dim"],
        vae_config["vocab_size"],
    )
    rope = dit_config["rope_dim"]
    dit_weights = random_weights(dit_shapes(dit_config), generator)
    for i in range(dit_config["num_layers"]):
        dit_weights[f"blocks.{i}.msa.rope.rope.freqs"] = 1 / 10000 ** (torch.arange(0, rope, 2) / rope)
    vae_weights = random_weights(vae_shapes(vae_config), generator)
    folder = FOLDER / name
    for part, config, weights in (("cola_dit", dit_config, dit_weights), ("cola_vae", vae_config, vae_weights)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(weights, folder / part / "model.safetensors", metadata={"format": "pt"})
    dit, vae = reference.read_model(folder / "cola_dit"), reference.read_model(folder / "cola_vae")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(*shape: int, high: int = vocab) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        values = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        save_file({key: value.detach().contiguous() for key, value in values.items()}, folder / f"{file}.safetensors")

    meta: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "pad_token_id": vocab - 1,
        "block_size": size,
        "patch_size": patch,
    }
    meta |= {"latent_dim": d, "vocab_size": vocab, "sampling": SAMPLING, "vae_decode_cached": {}}

    out: dict[str, Tensor] = {}
    for i, count in enumerate((2 * size, 3 * size)):
        ids = integers(count * patch)
        ids[1] = vocab if i else ids[1]  # the extra row of the embedding
        mean, logvar = reference.encode(vae, ids)
        assert logvar is not None
        out |= {f"input_ids_{i}": ids, f"mean_{i}": mean, f"logvar_{i}": logvar}
    write("vae_encode", out)

    out = {}
    for i, count in enumerate((2 * size, 3 * size)):
        z = normal(count, d)
        out |= {f"z_{i}": z, f"logits_{i}": reference.decode(vae, z)}
        meta["vae_decode_cached"][f"sample_{i}"] = {"prefix_latents": count - size, "then_blocks": [size]}
    write("vae_decode", out)
    write("vae_decode_cached", out)

    out = {"t_per_sample": torch.tensor([250.0, 812.5])}
    for i, count in enumerate((2 * size, 3 * size)):
        x, t, nothing = normal(count, d), 1000 * torch.rand(count, generator=generator), torch.empty(0, d)
        cases = {"t0": torch.zeros(count), "tok": t, "scalar437.5": torch.full((count,), 437.5)}
        cases["persample"] = out["t_per_sample"][i].expand(count)
        out |= {f"x_{i}": x, f"t_{i}": t}
        out |= {f"v_{case}_{i}": reference.dit_after(dit, nothing, x, times) for case, times in cases.items()}
    write("dit_prefix", out)

    out = {}
    for i, count in enumerate((2 * size, 3 * size)):
        prefix, block, block2 = normal(count, d), normal(size, d), normal(size, d)
        t = torch.full((size,), 750.0)
        t[: 2 * i] = 0
        out |= {f"prefix_{i}": prefix, f"block_{i}": block, f"t_block_{i}": t, f"block2_{i}": block2}
        out[f"v_cond_{i}"] = reference.dit_after(dit, prefix, block, t)
        out[f"v_uncond_{i}"] = reference.dit_after(dit, prefix[:0], block, t)
        out[f"v_commit_{i}"] = reference.dit_after(dit, prefix, block, torch.zeros(size))
        out[f"v_cond2_{i}"] = reference.dit_after(dit, torch.cat((prefix, block)), block2, torch.full((size,), 500.0))
    write("dit_block", out)

    out, samples = {}, [(8, 4, 8), (6, 2, 5)]
    meta["train_2l"] = {
        "samples": [dict(zip(("L", "block_size", "unpadded_len"), sample, strict=True)) for sample in samples]
    }
    parameters = {key: value.requires_grad_() for key, value in dit[1].items() if "freqs" not in key}
    error, count = torch.zeros(()).double(), torch.zeros(())
    for i, (length, block_size, unpadded) in enumerate(samples):
        z0, z1, t = normal(length, d), normal(length, d), torch.sigmoid(1 + normal(1))[0]
        given = torch.zeros(length, dtype=torch.bool)
        for start in range(0, length, block_size):
            if torch.rand((), generator=generator) < 0.6:
                given[start : start + 1 + int(integers(high=block_size - 1) if block_size > 2 else 0)] = True
        z_noisy = torch.where(given[:, None], z0, (1 - t) * z0 + t * z1)
        ts, mask = torch.where(given, 0, 1000 * t), (~given & (torch.arange(length) < unpadded)).float()
        v_clean, v_noisy = reference.packed(dit, z0, z_noisy, ts, block_size)
        error = error + (mask * (v_noisy - (z1 - z0)).square().mean(-1)).sum()
        count = count + mask.sum()
        values = {"z0": z0, "z1": z1, "t": t, "z_noisy": z_noisy, "ts_noisy": ts, "loss_mask": mask, "target": z1 - z0}
        out |= {f"{key}_{i}": value for key, value in (values | {"v_clean": v_clean, "v_noisy": v_noisy}).items()}
    out["loss"] = error / count.clamp(min=1)
    out["packed_allowed_mask"] = torch.block_diag(*(reference.packed_allowed(s[0], s[1]).byte() for s in samples))
    gradients = torch.autograd.grad(out["loss"], list(parameters.values()))
    write("train_2l", out)
    write("train_2l_grads", dict(zip(parameters, gradients, strict=True)))
    dit[1].update({key: value.detach() for key, value in parameters.items()})

    logits, seen = 3 * normal(2, size * patch, vocab), integers(2, 5)
    out = {"logits": logits, "generated_ids": seen}
    for case, settings in SAMPLING.items():
        temperature, top_k, top_p, penalty = settings.values()
        for sample, ids in zip(logits, seen.tolist(), strict=True):
            penalised = reference_generation.penalise(sample, ids, penalty)
            rows = [reference_generation.probabilities(row, temperature, top_k, top_p) for row in penalised]
            out[f"probs_{case}"] = torch.cat((out.get(f"probs_{case}", torch.empty(0)), torch.stack(rows)[None]))
    for penalty in (1.0, 1.1):
        penalised = [
            reference_generation.penalise(sample, ids, penalty)
            for sample, ids in zip(logits, seen.tolist(), strict=True)
        ]
        out[f"greedy_rp{penalty}"] = torch.stack(penalised).argmax(-1)
    write("sampling", out)

    prompts = [integers(length, high=vocab - 1) for length in PROMPT_LENGTHS[name]]
    lists = [prompt.tolist() for prompt in prompts]
    args = GENERATE[name] | {"temperature": 0.0, "T": 1000.0, "sample_ids": [3, 11, 7], "base_noise_seed": seed}
    steps = args["max_new_tokens"] // (size * patch)
    noise = torch.stack([_noise(seed, args["sample_ids"], step, (size, d)) for step in range(steps)])
    margins = []

    def run(rows: list[int], **changes: Any) -> dict[str, Any]:
        settings = args | {"pad_id": vocab - 1, "stop_ids": [], "bf16_times": False} | changes
        result = reference_generation.generate(
            dit, vae, [lists[row] for row in rows], lambda step, row: noise[step, rows[row]], settings
        )
        best = result["logits_penalised"].topk(2).values
        margins.append(float((best[..., 0] - best[..., 1]).min()))
        return result

    everyone = [0, 1, 2]
    result = run(everyone)
    eos = result["output_ids"][1][0]
    write("generate", {f"prompt_ids_{j}": prompt for j, prompt in enumerate(prompts)} | {"noise": noise}
          | {f"output_ids_{j}": torch.tensor(ids) for j, ids in enumerate(result["output_ids"])}
          | {key: value for key, value in result.items() if key != "output_ids"})  # fmt: skip
    meta["generate"] = args | {"prompt_lens": PROMPT_LENGTHS[name], "output_ids": result["output_ids"]}
    solo, batch = run([1], stop_ids=[eos]), run(everyone, stop_ids=[eos])
    meta["generate_eos"] = {
        "eos_token_id": eos,
        "solo_prompt_index": 1,
        "solo_output_ids": solo["output_ids"][0],
        "solo_steps": len(solo["block_ids"]),
        "batched_with_im_end_token_id": {"output_ids": batch["output_ids"], "steps": len(batch["block_ids"])},
    }
    result = run(everyone, max_new_tokens=1)
    meta["generate_force_complete"] = {"max_new_tokens": 1, "output_ids": result["output_ids"]}
    plain = {"guidance_scale": 1.0, "repetition_penalty": 1.0}
    meta["generate_cfg1_rp1"] = plain | {"output_ids": run(everyone, **plain)["output_ids"]}
    result = run(everyone, bf16_times=True)
    meta["generate_bf16_timesteps"] = {"output_ids": result["output_ids"]}
    write("generate_bf16_timesteps", {key: result[key] for key in ("final_latents", "block_ids")})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    assert min(margins) > 2e-3, f"{name}: a token is chosen by a margin of {min(margins)}; take another seed"
    print(f"{name}: eos after {meta['generate_eos']['solo_steps']} blocks, margin {min(margins):.4f}")


def _noise(seed: int, ids: list[int], step: int, shape: tuple[int, int]) -> Tensor:
    seeds = [seed + 1000 * sample + 10_000_000 * step for sample in ids]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


if __name__ == "__main__":
    make("configA", seed=9)
    make("configB", seed=4)
