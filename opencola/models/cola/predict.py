"""What the trunk of a prior predicts by itself: each token from those before, so that texts have exact probabilities.

It reads posterior means: p(x_i | mean of q(z | x_1 .. x_(i-1))), the decoder and the denoiser having no part in it.
"""

from collections.abc import Sequence

import torch

from opencola.errors import UserError
from opencola.kernels.choice import invariant
from opencola.layers.cache import ROUND
from opencola.models.cola.parts import ColaParts
from opencola.models.inputs import checked_texts
from opencola.models.language_model import Score


@invariant
@torch.no_grad()
def trunk_score(
    model: ColaParts, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], rows: int
) -> Score:
    """log p(continuation | prompt) of token ids under the trunk. rows: texts to compute at a time.

    Sums are in float64. Raises UserError for a prior whose trunk predicts nothing, empty continuations and ids beyond
    the vocabulary.
    """
    vae, dit, head = model.vae, model.dit, model.dit.next_token
    if head is None:
        raise UserError("estimator trunk: this prior has no trunk that predicts (dit.trunk_layers, prior.lambda_ar)")
    texts = checked_texts(prompts, continuations, vae.config.vocab_size)
    total, device = torch.zeros(len(texts), dtype=torch.float64), vae.head.weight.device
    by_width: dict[int, list[int]] = {}
    for place, text in enumerate(texts):  # whole steps of matrix kernels: padding never changes the order of a sum
        by_width.setdefault(-(-len(text) // ROUND) * ROUND, []).append(place)
    for width, places in by_width.items():
        for first in range(0, len(places), rows):
            batch = places[first : first + rows]
            tokens = torch.tensor([texts[place] + [0] * (width - len(texts[place])) for place in batch], device=device)
            h = head.features(dit.read_text(vae.normalise(vae.encode(tokens).mean)))
            for place, features in zip(batch, h, strict=True):
                targets = torch.tensor(continuations[place], device=device)
                log_p = head.out(features[len(prompts[place]) : len(texts[place])]).double().log_softmax(-1)
                total[place] = log_p.gather(-1, targets[:, None]).sum()
    counts = torch.tensor([len(continuation) for continuation in continuations])
    return Score(total, torch.zeros_like(total), counts, "exact", "exact, of the trunk", {})
