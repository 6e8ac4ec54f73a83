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
from opencola.layers.cache import whole_steps
from opencola.models.cola.parts import ColaParts
from opencola.models.exact import exact_score, last
from opencola.models.inputs import checked_prompts, checked_texts
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
    head = predictor(model.dit, "estimator trunk")
    texts = checked_texts(prompts, continuations, model.vae.config.vocab_size)

    def features(places: list[int], width: int) -> Tensor:
        return features_of(model, head, [texts[place] for place in places], width)

    return exact_score(texts, continuations, features, head.out, rows, label)


def features_of(model: ColaParts, head: NextToken, texts: Sequence[list[int]], width: int) -> Tensor:
    """What the tokens of texts are predicted from: (B, width or more, D)."""
    vae, dit = model.vae, model.dit
    padded = [text + [0] * (width - len(text)) for text in texts]
    tokens = torch.tensor(padded, device=vae.head.weight.device)
    return head.features(dit.read_text(vae.normalise(vae.encode(tokens).mean)))


@invariant
@torch.no_grad()
def log_probabilities(model: ColaParts, text: Sequence[int], count: int) -> Tensor:
    """log p (count, V), float64, under the trunk of what may stand in the place of each of the last `count` tokens of a
    text. Raises UserError for a prior whose trunk predicts nothing."""
    head = predictor(model.dit, "log-probabilities of tokens")
    (checked,) = checked_prompts([text], model.vae.config.vocab_size)
    return last(features_of(model, head, [checked], whole_steps(len(text)))[0, : len(text)], count, head.out)
