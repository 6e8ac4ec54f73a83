"""From the body of a request to what the engine is to write."""

import secrets
from dataclasses import dataclass, replace

from opencola.errors import UserError
from opencola.models.text_stream import encode
from opencola.serve.errors import ApiError, unknown_model
from opencola.serve.protocol import Body, ChatBody, CompletionBody
from opencola.serve.requests import Request
from opencola.serve.service import Service
from opencola.text.conversations import Message
from opencola.text.tokenizer import Tokenizer

SAFE_SEEDS = 2**53
"""Whole numbers below are the same in every JSON reader."""
ROLES = {"developer": "system"}


@dataclass(frozen=True)
class Work:
    """What a request asks for."""

    requests: list[Request]
    """Text i * n + j is choice j of prompt i, and has that number as its `sample`."""
    heads: list[str]
    """What each text begins with: with `echo` its prompt."""
    prompt_tokens: int
    seed: int
    watch: bool
    """Whether the answer is to tell of blocks and tokens, too."""
    held: bool
    """Whether the texts are held to a grammar."""
    scored: bool
    """Whether the answer is to tell log-probabilities."""
    echo: bool
    """Whether texts begin with their prompts."""


def work_of(service: Service, body: Body) -> Work:
    """What a body asks for. Tokenises, which may take a moment. Raises ApiError for what cannot be done."""
    _check(service, body)
    given = body.given()
    given.setdefault("seed", secrets.randbelow(SAFE_SEEDS))
    try:
        sampling = replace(service.sampling, **given, chat=isinstance(body, ChatBody))
    except UserError as error:  # fields that exclude each other
        raise ApiError(400, str(error), code="invalid_value") from None
    if sampling.work > max(service.max_work, service.sampling.work):
        raise ApiError(
            400,
            f"a block would cost {sampling.work} passes of the network, and may cost {service.max_work}: "
            "ask for fewer steps or candidates, or a shorter block",
            code="too_large",
        )
    several = len(body.prompts) if isinstance(body, CompletionBody) else 1
    if several * body.choices > service.engine.limits.max_waiting:
        raise ApiError(
            400,
            f"a request may ask for {service.engine.limits.max_waiting} texts at a time, not {several * body.choices}",
            param="n" if several == 1 else "prompt",
            code="too_large",
        )
    prompts, end_ids, heads = _encoded(service.engine.tokenizer, service.engine.model.vocab_size, body)
    choices = [i for i in range(len(prompts)) for _ in range(body.choices)]
    rules = body.rules()
    try:
        grammars = [service.grammars.compile(rule.kind, rule.text) for rule in rules]
        constraints = [grammars[0].constraint(end_ids) if grammars else None for _ in choices]
    except UserError as error:
        raise ApiError(400, str(error), param=rules[0].field, code="invalid_value") from None
    ends = () if sampling.ignore_eos else end_ids
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    return Work(
        [
            Request(prompts[i], sampling, ends, sample, bool(body.watch), body.scored, echo, constraint)
            for sample, (i, constraint) in enumerate(zip(choices, constraints, strict=True))
        ],
        [heads[i] for i in choices],
        sum(map(len, prompts)),
        sampling.seed,
        bool(body.watch),
        bool(rules),
        body.scored is not None,
        echo,
    )


def _check(service: Service, body: Body) -> None:
    """Raise ApiError where fields, each of them right, ask for what cannot be."""
    if body.model not in (None, service.name):
        raise unknown_model(str(body.model), service.name)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise _wrong("max_tokens", "is max_completion_tokens by its older name: leave out one")
    for field in ("stream_options", "watch"):
        if getattr(body, field) and not body.stream:
            raise _wrong(field, "is for streams only")
    match body:
        case CompletionBody(best_of=int(best_of)) if best_of != body.choices:
            raise _wrong("best_of", "must be n: no text is written to be thrown away")
        case ChatBody(top_logprobs=int(), logprobs=None | False):
            raise _wrong("top_logprobs", "needs logprobs")
    if len(rules := body.rules()) > 1:
        raise _wrong(rules[1].field, f"excludes {rules[0].field}: leave out one")


def _wrong(param: str, problem: str) -> ApiError:
    return ApiError(400, f"{param}: {problem}", param=param, code="invalid_value")


def _encoded(tokenizer: Tokenizer, vocab_size: int, body: Body) -> tuple[list[list[int]], tuple[int, ...], list[str]]:
    """Token ids of the prompts, of what ends their texts, and what these begin with."""
    if isinstance(body, ChatBody):
        messages = [Message(ROLES.get(message.role, message.role), message.text) for message in body.messages]
        try:
            return *encode(tokenizer, [messages], chat=True), [""]
        except UserError as error:
            raise ApiError(400, str(error), param="messages", code="no_conversations") from None
    assert isinstance(body, CompletionBody)
    texts, end_ids = encode(tokenizer, [prompt for prompt in body.prompts if isinstance(prompt, str)], chat=False)
    prompts = texts or [prompt for prompt in body.prompts if isinstance(prompt, list)]
    if any(token >= vocab_size for prompt in prompts for token in prompt):
        raise _wrong("prompt", f"token ids are below {vocab_size}")
    if not body.echo:
        return prompts, end_ids, [""] * len(prompts)
    return prompts, end_ids, [p if isinstance(p, str) else tokenizer.decode(p) for p in body.prompts]
