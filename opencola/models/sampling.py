"""The settings of generation that every family has, and the choice of tokens from logits (model.md §5, official-format
§6)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.ranges import Count, NotNegative, Positive, Range, Seed, Size, check


@dataclass(frozen=True)
class Sampling:
    """Settings of generation. A family's own class adds those that only it has (`build.sampling_class`)."""

    owner: ClassVar[str] = "a model"
    """What messages call a model of the family."""
    left_to_right: ClassVar[bool] = True
    """Whether a text's tokens stay as they are once later ones are chosen: it can then be held to a constraint."""
    max_new_tokens: Count = 64
    """Largest number of tokens to write, the prompt not counted."""
    temperature: NotNegative = 0.0
    """Temperature of the token choice; 0 takes the most probable token."""
    top_k: Size = 0
    """Number of most probable tokens to choose among; 0: all."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Choose among the most probable tokens that together reach this probability, above 0 and at most 1 (all)."""
    repetition_penalty: Positive = 1.0
    """Divides positive and multiplies negative logits of tokens already written; 1: none."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are cut off."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    chat: bool = False
    """A prompt is what a user says, and the text an assistant's answer, up to its end (for models of conversations)."""
    seed: Seed = 0
    """Seed of all draws, which depend on it, the sample's id and the place in its text alone."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def hints(cls) -> dict[str, Any]:
        """The settings by name, with their types and ranges."""
        types = get_type_hints(cls, include_extras=True)
        return {field.name: types[field.name] for field in fields(cls)}

    @classmethod
    def lacks(cls, asked: str, spell: Callable[[str], str] = str) -> UserError:
        """What to raise where `asked` is no setting of the family; spell: how those that it has are written."""
        return UserError(f"{cls.owner} has no {asked}; its settings are {', '.join(map(spell, cls.hints()))}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken everywhere."""
        return self.temperature < 1e-5

    @property
    def common(self) -> "Sampling":
        """Those settings in which texts that are written side by side have to be alike: what only the family has."""
        return replace(self, **asdict(Sampling()))

    @property
    def work(self) -> int:
        """What a block costs, in passes of the network: at most, and roughly."""
        return 1

    @property
    def shows_padding(self) -> bool:
        """Whether the model sees the token that prompts are filled up with."""
        return False

    @property
    def ends_together(self) -> bool:
        """Whether the samples of a batch end together, so that what one becomes depends on the others."""
        return False


def penalise(logits: Tensor, seen: Sequence[Sequence[int]], penalties: Sequence[float]) -> Tensor:
    """Logits (B, R, V) with every token of seen[b] made less likely, once however often it was seen."""
    logits = torch.nan_to_num(logits, nan=0.0, posinf=1e4, neginf=-1e4)
    for row, tokens, penalty in zip(logits, seen, penalties, strict=True):
        if penalty != 1 and tokens:
            place = torch.tensor(sorted(set(tokens)), device=row.device)
            known = row[:, place]
            row[:, place] = torch.where(known < 0, known * penalty, known / penalty).clamp(-1e30, 1e30)
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Distribution (..., V) that tokens are drawn from: temperature (not 0), then top-k, then top-p."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        beyond = mass.cumsum(-1) - mass > sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(-1)


def choose(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator], *, wide: bool = True
) -> Tensor:
    """Token ids (B, R) from logits (B, R, V), every sample with its own settings and generator.

    wide: draw in float64, so that no improbable token is lost to rounding; else in the logits' own type.
    """
    if all(sampling.greedy for sampling in samplings):
        return logits.argmax(-1)
    drawn = []
    for row, sampling, generator in zip(logits, samplings, generators, strict=True):
        if sampling.greedy:
            drawn.append(row.argmax(-1))
        else:
            weights = probabilities(row.double() if wide else row, sampling).cpu()
            drawn.append(torch.multinomial(weights, 1, generator=generator)[:, 0].to(row.device))
    return torch.stack(drawn)
