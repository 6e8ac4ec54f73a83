"""Look at the latents of a text, and at how much noise they bear: seconds of one core.

    .venv/bin/python examples/latents.py [MODEL]

`opencola latents` and `opencola inspect` show far more (docs/guide/latents.md).
"""

import sys

import torch

import opencola

TEXT = "Once a little girl named Mia lived near the zoo. Mia met a frog behind the lions."

cola, tokenizer, _ = opencola.load(*sys.argv[1:])
if not isinstance(cola, opencola.Cola):
    sys.exit("this model has no latents: name a Cola DLM")
tokens = torch.tensor([tokenizer.encode(TEXT)], device=next(cola.parameters()).device)
tokens = tokens[:, : tokens.shape[1] // cola.vae.config.patch_size * cola.vae.config.patch_size]

with torch.no_grad():
    posterior = cola.vae.encode(tokens)
    print(f"{tokens.shape[1]} tokens, latents {tuple(posterior.mean.shape)}, logSNR {posterior.logsnr().item():.2f}")
    print(f"KL to N(0, I): {posterior.kl().mean().item():.1f} nats a latent")

    torch.manual_seed(0)
    for deviation in (0.0, 0.5, 1.0, 1.5, 2.0):
        z = posterior.mean + deviation * torch.randn_like(posterior.mean)
        decoded = cola.vae.decode(z).argmax(-1)
        right = (decoded == tokens).float().mean().item()
        print(f"noise {deviation}: {right:4.0%} of the tokens | {tokenizer.decode(decoded[0].tolist())[:70]}")
