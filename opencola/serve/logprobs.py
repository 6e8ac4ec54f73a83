"""Log-probabilities of tokens in OpenAI's two shapes."""

from collections.abc import Callable, Sequence
from typing import Any

from opencola.serve.requests import Scored

Decode = Callable[[list[int]], str]


def of_completion(scores: Sequence[Scored], decode: Decode, start: int) -> dict[str, Any]:
    """Of /v1/completions; start: where the first token's text begins. A token's text is that of it alone."""
    tokens = [decode([score.token]) for score in scores]
    offsets = [start]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{decode([token]): value for token, value in reversed(score.best)} for score in scores],
        "text_offset": offsets[:-1],
    }


def of_chat(scores: Sequence[Scored], decode: Decode) -> dict[str, Any]:
    """Of /v1/chat/completions."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = decode([token])
        return {"token": text, "logprob": value, "bytes": [*text.encode()]}

    best = [[entry(*pair) for pair in score.best] for score in scores]
    rows = zip(scores, best, strict=True)
    return {"content": [entry(score.token, score.logprob) | {"top_logprobs": top} for score, top in rows]}
