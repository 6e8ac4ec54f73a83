"""What the trunk of a prior predicts by itself: each token from those before, so that texts have exact probabilities.

It reads posterior means: p(x_i | mean of q(z | x_1 .. x_(i-1))), the decoder and the denoiser having no part in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.flow.dit import BlockCausalDiT
from opencola.flow.next_token import NextToken
from opencola.kernels.choice import invariant
from opencola.models.cola.parts import ColaParts
from opencola.models.exact import exact_score
from opencola.models.inputs import checked_texts
from opencola.models.language_model import Score


def predictor(dit: BlockCausalDiT, asked: str) -> NextToken:
    """The trunk's head. Raises UserError, naming what is asked, for a prior without one."""
    if dit.next_token is None:
        raise UserError(f"{asked}: this prior has no trunk that predicts (dit.trunk_layers, prior.lambda_ar)")
    return dit.next_token


@invariant
@torch.no_grad()
def trunk_score(
    model: ColaParts, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], rows: int, label: str
) -> Score:
    """log p(continuation | prompt) of token ids under the trunk. rows: texts to compute at a time.

    Raises UserError for a prior whose trunk predicts nothing, empty continuations and ids beyond the vocabulary.
    """
    vae, dit, head = model.vae, model.dit, predictor(model.dit, "estimator trunk")
    texts = checked_texts(prompts, continuations, vae.config.vocab_size)

    def features(places: list[int], width: int) -> Tensor:
        padded = [texts[place] + [0] * (width - len(texts[place])) for place in places]
        tokens = torch.tensor(padded, device=vae.head.weight.device)
        return head.features(dit.read_text(vae.normalise(vae.encode(tokens).mean)))

    return exact_score(texts, continuations, features, head.out, rows, label)
