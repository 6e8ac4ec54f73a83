"""Models in EleutherAI's lm-evaluation-harness: importing this module makes them known to it as `opencola`.

The harness looks for no models in other packages, so that its own command cannot know this one: `opencola lm_eval` is
that command with the model in it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any, get_type_hints

import lm_eval.models  # noqa: F401 its own models, which it loads by itself only while it knows of none
import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from rich.console import Console
from rich.progress import track

from opencola.checkpoints import hub, parts
from opencola.checkpoints.files import checked
from opencola.errors import UserError
from opencola.layers.device import device as own_device
from opencola.models import build
from opencola.models.sampling import Sampling
from opencola.models.text_stream import generate_text, whole_texts
from opencola.version import __version__

Pair = tuple[list[int], list[int]]
"""Token ids of a context, maybe none, and of what follows it."""

MAX_NEW_TOKENS = 256  # where neither the task nor the user says, as with the harness's other models


@register_model("opencola")
class OpenCola(LM):
    """A model of ours as the harness asks it: for texts, and for log-probabilities in nats.

    Draws depend on the seed and the document's number in its task, never on what else is asked.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int = 2048,
        greedy: bool = False,
        **settings: Any,
    ) -> None:
        """Load the model in a folder or in a repository of the Hub, there at some revision.

        device: torch's name for it (else a GPU if there is one); batch_size: requests at a time; max_length: tokens
        of the windows of loglikelihood_rolling; greedy: whether a continuation is the model's own is found out by
        generating, for models without exact log-probabilities, too; settings: the family's, of generation and by
        `score_names` of scoring. Raises UserError for what is none and for impossible values; errors of loading as
        `hub.from_pretrained`.
        """
        super().__init__()
        folder = hub.locate(str(pretrained), revision)
        family = parts.family_in(folder)
        scoring, sampling = build.scoring_class(family), build.sampling_class(family)
        names = score_names(scoring, sampling)
        hints = sampling.hints() | {name: hint for name, (_, hint) in names.items()}
        given = read_settings("model_args", settings, hints, sampling.owner)
        self.scoring: Any = scoring(**{field: given[name] for name, (field, _) in names.items() if name in given})
        self.batch_size = positive("batch_size", batch_size)
        self.max_length = positive("max_length", max_length)
        self.greedy = checked("model_args", "greedy", greedy, bool)
        loaded = hub.from_pretrained(folder)
        chosen = {"max_new_tokens": MAX_NEW_TOKENS} | {name: given[name] for name in given if name in sampling.hints()}
        self.sampling = replace(loaded.sampling, **chosen)
        self.tokenizer = loaded.tokenizer
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = own_device().type  # the harness's command asks for cuda:0 by itself
        self.model = loaded.model.to(device).requires_grad_(False)  # a graph of the latents only
        self.estimators: set[str] = set()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "OpenCola":
        """The model that --model_args describe; --batch_size and --device hold where these are silent."""
        if "pretrained" not in arg_dict:
            raise UserError("model_args name no model: add pretrained=FOLDER or pretrained=OWNER/NAME")
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**flags | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "OpenCola":
        """The same of "KEY=VALUE,KEY=VALUE"."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the results beside its own settings."""
        return {
            "opencola": __version__,
            "sampling": asdict(self.sampling),
            "scoring": asdict(self.scoring),
            "log_likelihoods": sorted(self.estimators),
            "max_length": self.max_length,
            "greedy": self.greedy,
        }

    def chat_template(self, chat_template: bool | str = False) -> str:
        """There is none: a tokenizer of ours never reads special tokens out of a text."""
        if chat_template:
            raise UserError("--apply_chat_template is not supported: answers of a chat model need model_args chat=true")
        return ""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of (context, generation_kwargs), without the string that ended them."""
        settings = [generation(self.sampling, request.args[1]) for request in requests]
        ids = draw_ids(requests)
        texts: list[str] = []
        for sampling, places in groupby(range(len(requests)), key=lambda place: settings[place]):
            for batch in self._batches(list(places), "generating", disable_tqdm):
                prompts, keys = [requests[place].args[0] for place in batch], [ids[place] for place in batch]
                batch_texts = whole_texts(self.model, self.tokenizer, prompts, sampling, keys)
                for place, text in zip(batch, batch_texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
                texts += batch_texts
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) of (context, continuation), and whether greedy generation writes that.

        The second is False where nobody looked: see `greedy`.
        """
        texts = [move_space(*request.args) for request in requests]
        pairs = [self.tokenizer.encode_pair(*text) for text in texts]
        ids = draw_ids(requests)
        answers: list[tuple[float, bool]] = []
        for places in self._batches(range(len(requests)), "scoring", disable_tqdm):
            batch, keys = [pairs[place] for place in places], [ids[place] for place in places]
            totals, exact = self._score(batch, keys)
            own = [False] * len(places)
            if exact or self.greedy:
                own = self._is_own([texts[place][0] for place in places], [tokens for _, tokens in batch], keys)
            for place, answer in zip(places, zip(totals, own, strict=True), strict=True):
                self.cache_hook.add_partial("loglikelihood", requests[place].args, answer)
                answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, from nothing; of texts longer than max_length the sum over windows."""
        windows = [roll(self.tokenizer.encode(request.args[0]), self.max_length) for request in requests]
        jobs = [
            (pair, id_ + (number << 40))
            for pairs, id_ in zip(windows, draw_ids(requests), strict=True)
            for number, pair in enumerate(pairs)
        ]
        window_scores: list[float] = []
        sums: list[float] = []
        for places in self._batches(range(len(jobs)), "scoring", disable_tqdm):
            window_scores += self._score([jobs[place][0] for place in places], [jobs[place][1] for place in places])[0]
            while len(sums) < len(requests) and len(window_scores) >= len(windows[len(sums)]):
                request, count = requests[len(sums)], len(windows[len(sums)])
                sums.append(sum(window_scores[:count]))
                del window_scores[:count]
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def _score(self, pairs: Sequence[Pair], ids: Sequence[int]) -> tuple[list[float], bool]:
        """Nats of each continuation (0 of an empty one), and whether they are exact."""
        places = [place for place, (_, continuation) in enumerate(pairs) if continuation]
        totals = [0.0] * len(pairs)
        if not places:
            return totals, True
        prompts, continuations = ([pairs[place][side] for place in places] for side in (0, 1))
        keys = [ids[place] for place in places]
        # only an end of text tells the model that nothing follows, so blocks are filled up with more of them
        score = self.model.score(prompts, continuations, self.scoring, pad_id=self.tokenizer.eos_id, ids=keys)
        score.check_finite([f"the continuation {self.tokenizer.decode(tokens)!r}" for tokens in continuations])
        for place, total in zip(places, score.total.tolist(), strict=True):
            totals[place] = total
        label = f"{score.kind}: {score.estimator}"
        if label not in self.estimators:
            self.estimators.add(label)
            Console(stderr=True).print(f"log-likelihoods in nats, {label}", highlight=False, soft_wrap=True)
        return totals, score.kind == "exact"

    def _is_own(self, contexts: Sequence[str], continuations: Sequence[list[int]], ids: Sequence[int]) -> list[bool]:
        """Whether each continuation is what the model writes, with the most probable token at every place."""
        longest = max(1, *(len(tokens) for tokens in continuations))
        sampling = replace(self.sampling, temperature=0.0, repetition_penalty=1.0, max_new_tokens=longest)
        sampling = replace(sampling, stop=(), ignore_eos=True, chat=False)
        written: list[list[int]] = [[] for _ in contexts]
        for pieces in generate_text(self.model, self.tokenizer, contexts, sampling, ids):
            for piece in pieces:
                written[piece.sample] += piece.tokens
            if all(
                new[: len(tokens)] != tokens[: len(new)] for new, tokens in zip(written, continuations, strict=True)
            ):
                break  # none of them any more
        return [new[: len(tokens)] == tokens for new, tokens in zip(written, continuations, strict=True)]

    def _batches(self, places: Sequence[int], what: str, quiet: bool) -> Iterator[Sequence[int]]:
        firsts = range(0, len(places), self.batch_size)
        for first in track(firsts, what, console=Console(stderr=True), disable=quiet):
            yield places[first : first + self.batch_size]


def score_names(scoring: type, sampling: type[Sampling]) -> dict[str, tuple[str, Any]]:
    """The settings of scoring by what the user calls them, each with its field and type.

    A name that generation has, too, is generation's, but the seed is both's.
    """
    hints = get_type_hints(scoring, include_extras=True)
    taken = sampling.hints().keys() - {"seed"}
    return {f"score_{name}" if name in taken else name: (name, hint) for name, hint in hints.items()}


def read_settings(place: str, given: Mapping[str, Any], hints: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Settings by name, each of its type. Raises UserError for others, naming the place, what `owner` has, and them."""
    if unknown := sorted(given.keys() - hints.keys()):
        raise UserError(f"{place}: {unknown[0]} is no setting of {owner}; there are: {', '.join(hints)}")
    return {name: checked(place, name, value, hints[name]) for name, value in given.items()}


def positive(name: str, value: int | str) -> int:
    """A number that must be whole and at least 1: --batch_size comes as a text. Raises UserError."""
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)


def generation(sampling: Sampling, given: Mapping[str, Any]) -> Sampling:
    """The settings that a task's generation_kwargs ask for, over those of the model.

    Of the harness: until, max_gen_toks (and its other names), do_sample, without which tokens are the most probable
    ones whatever the model's temperature; and our own settings by name. Raises UserError for others.
    """
    asked = dict(normalize_gen_kwargs(dict(given), sampling.max_new_tokens))
    until = [string for string in asked.pop("until") if string]
    changes: dict[str, Any] = {"max_new_tokens": asked.pop("max_gen_toks"), "temperature": sampling.temperature}
    if not asked.pop("do_sample"):
        changes["temperature"] = asked["temperature"] = 0.0
    changes |= {"stop": sampling.stop} | read_settings("generation_kwargs", asked, sampling.hints(), sampling.owner)
    return replace(sampling, **changes | {"stop": (*until, *changes["stop"])})


def draw_ids(requests: Sequence[Instance]) -> list[int]:
    """What decides the draws of each request: its document's number in the task (its place, where it has none).

    So the choices of a question share their draws. A request that comes again, as tasks with repeats want it, has new
    ones.
    """
    seen: Counter[tuple[Any, ...]] = Counter()
    ids = []
    for place, request in enumerate(requests):
        key = (request.task_name, place if request.doc_id is None else request.doc_id, request.idx)
        ids.append(key[1] + (seen[key] << 32))
        seen[key] += 1
    return ids


def move_space(context: str, continuation: str) -> tuple[str, str]:
    """The same text with white space at the context's end moved behind it: there it belongs to a word's token."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def roll(tokens: list[int], max_length: int) -> list[Pair]:
    """The harness's windows: each token is scored once, the first from nothing, those of later windows after at least
    one token. No tokens are a window, too."""
    if not tokens:
        return [([], [])]
    windows = utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=max_length, context_len=1)
    pairs = [utils.make_disjoint_window(window) for window in windows]
    return [(list(context) if number else [], list(new)) for number, (context, new) in enumerate(pairs)]
