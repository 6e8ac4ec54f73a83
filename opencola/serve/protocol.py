"""The bodies of requests: OpenAI's fields, and every setting of the model's family.

An unknown field is an error, and so is one of OpenAI's that cannot be honoured, unless its value asks for nothing.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from opencola.models.sampling import Sampling
from opencola.ranges import LARGEST, Range, ranged

BodyKind = TypeVar("BodyKind", bound="Body")
MAX_CHOICES, MAX_STOPS, MAX_PROMPTS = 128, 4, 2048
LARGEST_FLOAT = float.fromhex("0x1.fffffep+127")
"""Of float32, which models compute in."""
RENAMED = {"max_new_tokens", "stop", "chat"}
"""Settings of generation that have OpenAI's names and forms here."""


class Only:
    """Marks a field of OpenAI's that cannot be honoured; values: those that ask for nothing, as None does."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self._values]}

    def _check(self, value: Any) -> Any:
        # by type, too: False is no 0
        if not any(value == each and type(value) is type(each) for each in self._values):
            raise PydanticCustomError("unsupported", "this server cannot do that: leave it out")
        return value


def said(form: str) -> WrapValidator:
    """One message in place of one for each alternative of a type."""

    def check(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("form", "must be {form}", {"form": form}) from None

    return WrapValidator(check)


def bounds(allowed: Range) -> Any:
    """A range as pydantic knows it."""
    low, high = max(allowed.low, -LARGEST_FLOAT), min(allowed.high, LARGEST_FLOAT)
    above, below = allowed.above, allowed.below
    return Field(
        gt=low if above else None,
        ge=None if above else low,
        lt=high if below else None,
        le=None if below else high,
    )


Count = Annotated[int, bounds(Range(1, LARGEST))]
Choices = Annotated[int, bounds(Range(1, MAX_CHOICES))]
TokenIds = list[Annotated[int, bounds(Range(0, LARGEST))]]
Prompt = Annotated[
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[TokenIds, Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
    said(f"a text, token ids, or a list of at least one and at most {MAX_PROMPTS} texts or lists of token ids"),
]
Mark = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Mark | Annotated[list[Mark], Field(max_length=MAX_STOPS)] | None,
    said(f"a text, or a list of at most {MAX_STOPS} texts, none of them empty"),
]


class Strict(BaseModel):
    """What has no unknown fields, and converts no values."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None


class JsonSchema(Strict):
    """A schema that an answer is to fulfil."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("form", "json_schema belongs to the type json_schema, and to no other")
        return self


class Rule(NamedTuple):
    """What a text is held to."""

    field: str
    """That asks for it."""
    kind: Literal["json_schema", "regex", "grammar"]
    text: str


class Body(Strict):
    """What both kinds of requests have."""

    settings: ClassVar[type[Sampling]] = Sampling

    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Stop = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    regex: Mark | None = None
    grammar: Mark | None = None
    watch: bool | None = None
    frequency_penalty: Annotated[Any, Only(0, 0.0)] = None
    presence_penalty: Annotated[Any, Only(0, 0.0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    def given(self) -> dict[str, Any]:
        """The settings of generation that the request names."""
        values = {name: getattr(self, name) for name in self.settings.hints() if name not in RENAMED}
        values["max_new_tokens"] = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        values["stop"] = (self.stop,) if isinstance(self.stop, str) else None if self.stop is None else tuple(self.stop)
        return {name: value for name, value in values.items() if value is not None}

    def rules(self) -> list[Rule]:
        """What the request holds its texts to."""
        found: list[Rule] = []
        match self.response_format:
            case ResponseFormat(type="json_object"):
                found.append(Rule("response_format", "json_schema", '{"type": "object"}'))
            case ResponseFormat(type="json_schema", json_schema=JsonSchema(schema_=schema)):
                found.append(Rule("response_format", "json_schema", json.dumps(schema)))
        if self.regex is not None:
            found.append(Rule("regex", "regex", self.regex))
        if self.grammar is not None:
            found.append(Rule("grammar", "grammar", self.grammar))
        return found

    @property
    def scored(self) -> int | None:
        """Of how many of the most probable tokens log-probabilities are asked for, beside the one that is written;
        None: nothing of that."""
        return None

    @property
    def choices(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def counted(self) -> bool:
        """Whether a stream ends with what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Body):
    """Of /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, bounds(Range(0, 5))] | None = None
    best_of: Choices | None = None
    suffix: Annotated[Any, Only("")] = None

    @property
    def scored(self) -> int | None:
        """As in the base class."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids, one or several."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else [*prompt]


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message; of the fields that are none of ours, those that an answer of OpenAI's has come back empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Part], said('a text, or a list of {"type": "text", "text": ...}')]
    name: Annotated[Any, Only()] = None
    refusal: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, bounds(Range(0, 20))] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Any, Only(False)] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None

    @property
    def scored(self) -> int | None:
        """As in the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None


def with_settings(body: type[BodyKind], sampling: type[Sampling]) -> type[BodyKind]:
    """A kind of body with a family's settings, in their ranges; one that is left out is the model's own."""
    family: Any = sampling
    ranges = {name: bounds(allowed) for name, _, allowed, _ in ranged(family)}
    settings: dict[str, Any] = {
        name: (Annotated[hint, ranges.get(name, Field())] | None, None)
        for name, hint in sampling.hints().items()
        if name not in RENAMED
    }
    model = create_model(body.__name__, __base__=body, __doc__=body.__doc__, **settings)
    model.settings = sampling
    return model
