"""The lm-evaluation-harness, the real one, with a tiny model and tasks of a few lines."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_cola

from opencola.checkpoints import hub, official
from opencola.checkpoints import parts as layout
from opencola.checkpoints.settings import save_sampling
from opencola.commands import main
from opencola.errors import UserError
from opencola.layers.llama import LlamaConfig
from opencola.models import build
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling
from opencola.models.cola.sampling import ColaSampling
from opencola.models.cola.score import Scoring
from opencola.models.text_stream import generate_text
from opencola.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="pip install 'opencola[harness]'")

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from opencola.evaluation import harness
from opencola.evaluation.harness import OpenCola

PROMPTS = ["The fox ran", "A bear", "The hill. The", "On the way to the hill the fox", "The"]
QUESTIONS = [
    ("The fox ran ", ["to the hill", "fox"], 0),
    ("A bear", ["sat", "to a friend", "ö"], 2),
    ("", ["A", "B"], 1),
]
TEXTS = ["The fox ran to the hill and sat there with a friend. " * 3, "A bear", "ö\n\nA friend."]
ARGS = {"samples": 2, "score_steps": 2, "score_solver": "euler", "seed": 3, "steps": 2, "max_length": 20}
SCORING = Scoring(samples=2, steps=2, solver="euler", seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose random weights write different texts from different prompts."""
    sentences = [f"The fox number {i} ran to the hill and sat there with a friend." for i in range(60)]
    tokenizer = Tokenizer.train(sentences, 300)
    root = tmp_path_factory.mktemp("model") / "tiny"
    cola = tiny_cola(vae={"vocab_size": tokenizer.vocab_size})
    official.save(cola, root, tokenizer)
    save_sampling(ColaSampling(steps=4, guidance=2.0, temperature=1.0, stop=("zzz",)), root)
    return root


@pytest.fixture(scope="module")
def written(folder: Path) -> list[str]:
    """What the model writes after each prompt, alone, when asked by the task below."""
    model, tokenizer, sampling = hub.from_pretrained(folder)
    sampling = replace(sampling, steps=2, seed=3, temperature=0.0, max_new_tokens=9, stop=("e", "zzz"))
    return [write(model, tokenizer, prompt, sampling, number) for number, prompt in enumerate(PROMPTS)]


def write(model: Any, tokenizer: Tokenizer, prompt: str, sampling: ColaSampling, id_: int) -> str:
    blocks = generate_text(model, tokenizer, [prompt], sampling, [id_])
    return "".join(pieces[0].text for pieces in blocks)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, written: Sequence[str]) -> Path:
    """A folder of tasks; the answers to the first three prompts are right."""
    root = tmp_path_factory.mktemp("tasks")
    answers = [*written[:3], "wrong", "wrong"]
    rows: dict[str, list[dict[str, Any]]] = {
        "tiny_write": [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)],
        "tiny_choose": [{"question": q, "choices": c, "right": r} for q, c, r in QUESTIONS],
        "tiny_text": [{"text": text} for text in TEXTS],
    }
    settings: dict[str, dict[str, Any]] = {
        "tiny_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 9},
            "metric_list": [{"metric": "exact_match"}],
        },
        "tiny_choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in settings.items():
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"data_files": {"test": str(file)}, "cache_dir": str(root / "cache")}
        task |= {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return root


def own_score(folder: Path, prompt: str, continuation: str, id_: int, settings: Scoring = SCORING) -> float:
    """Nats of a continuation, alone, tokens by parts: right for texts whose parts meet at a space."""
    model, tokenizer, _ = hub.from_pretrained(folder)
    pair = tokenizer.encode(prompt), tokenizer.encode(continuation)
    return model.score([pair[0]], [pair[1]], settings, pad_id=tokenizer.eos_id, ids=[id_]).total.item()


def ask(folder: Path, tasks: Path, *names: str, **fields: Any) -> Any:
    """The harness's results."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model: dict[str, Any] = {"model": "opencola", "model_args": {"pretrained": str(folder)} | ARGS}
    return simple_evaluate(**model | fields, tasks=list(names), task_manager=manager, bootstrap_iters=0)


def answers(results: Any, name: str) -> list[list[Any]]:
    """What the model answered, by document."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [[resp[0] for resp in sample["resps"]] for sample in samples]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tasks_of_all_kinds(folder: Path, tasks: Path, written: list[str], batch_size: int) -> None:
    found = ask(folder, tasks, "tiny_write", "tiny_choose", "tiny_text", batch_size=batch_size)
    assert len({*written}) == len(PROMPTS) and not any("e" in text for text in written)
    assert answers(found, "tiny_write") == [[text] for text in written]
    assert found["results"]["tiny_write"]["exact_match,none"] == pytest.approx(3 / 5)

    right, right_by_length = 0, 0
    for number, (question, choices, target) in enumerate(QUESTIONS):
        expected = [own_score(folder, question.rstrip(), own_space(question) + choice, number) for choice in choices]
        said = answers(found, "tiny_choose")[number]
        assert [total for total, _ in said] == pytest.approx(expected, rel=1e-4)
        assert [own for _, own in said] == [False] * len(choices)
        by_length = [total / len(choice) for total, choice in zip(expected, choices, strict=True)]
        right += expected.index(max(expected)) == target
        right_by_length += by_length.index(max(by_length)) == target
    assert found["results"]["tiny_choose"]["acc,none"] == pytest.approx(right / 3)
    assert found["results"]["tiny_choose"]["acc_norm,none"] == pytest.approx(right_by_length / 3)

    nats = sum(rolling(folder, text, number) for number, text in enumerate(TEXTS))
    words, size = sum(len(re.split(r"\s+", text)) for text in TEXTS), sum(len(text.encode()) for text in TEXTS)
    results = found["results"]["tiny_text"]
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-nats / words), rel=1e-3)
    assert results["bits_per_byte,none"] == pytest.approx(-nats / math.log(2) / size, rel=1e-4)

    assert found["config"]["scoring"]["samples"] == 2 and found["config"]["sampling"]["guidance"] == 2.0
    assert "estimate: IWAE, K = 2, euler, 2 steps (shift 0.2), 1 rademacher probe" in found["config"]["log_likelihoods"]


def own_space(question: str) -> str:
    """What stands between a question and a choice: its own spaces and the harness's delimiter."""
    return question[len(question.rstrip()) :] + " "


def rolling(folder: Path, text: str, number: int) -> float:
    """Nats of a text in windows of 20 tokens, by hand."""
    model, tokenizer, _ = hub.from_pretrained(folder)
    tokens, total = tokenizer.encode(text), 0.0
    for window, first in enumerate(range(0, len(tokens), 20)):
        new = tokens[first : first + 20]
        # the last window is as long as the others: what it does not score itself is its context
        known = tokens[max(0, first + len(new) - 21) : first]
        ids = [number + (window << 40)]
        total += model.score([known], [new], SCORING, pad_id=tokenizer.eos_id, ids=ids).total.item()
    return total


def requests(kind: Any, *arguments: tuple[Any, ...], repeats: int = 1) -> list[Instance]:
    """Requests as the harness makes them, of a document each."""
    return [
        Instance(kind, {}, args, 0, ("task", number, repeats))
        for number, args in enumerate(arguments)
        for _ in range(repeats)
    ]


@pytest.fixture(scope="module")
def model(folder: Path) -> OpenCola:
    return OpenCola(str(folder), batch_size=3, **ARGS)


def test_answers_depend_on_the_document_alone(model: OpenCola) -> None:
    asked = requests("generate_until", *((prompt, {"until": ["e"], "max_gen_toks": 9}) for prompt in PROMPTS * 2))
    found = model.generate_until(asked)
    assert model.generate_until(asked[::-1]) == found[::-1]
    assert model.generate_until(asked[3:4]) == found[3:4]
    assert found[: len(PROMPTS)] != found[len(PROMPTS) :]  # the same prompts in other documents
    scored = requests("loglikelihood", ("The fox", " ran"), ("The fox", " ran"))
    first, second = model.loglikelihood(scored)
    assert first != second and model.loglikelihood(scored[1:]) == [second]


def test_a_repeated_request_has_draws_of_its_own(model: OpenCola) -> None:
    asked = requests("generate_until", ("The fox", {"until": [], "max_gen_toks": 9}), repeats=3)
    assert len({*model.generate_until(asked)}) == 3


def test_stop_strings_are_all_honoured(model: OpenCola) -> None:
    prompt = "The fox"
    (whole,) = model.generate_until(requests("generate_until", (prompt, {"until": [""], "max_gen_toks": 30})))
    assert len(whole) > 4
    for until in (whole[3], [whole[3]], ["nowhere", whole[3:5], whole[4]]):
        (text,) = model.generate_until(requests("generate_until", (prompt, {"until": until, "max_gen_toks": 30})))
        strings = [until] if isinstance(until, str) else until
        assert text == whole[: min(place for string in strings if (place := whole.find(string)) >= 0)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 256, "temperature": 0.0, "stop": ("zzz",)}),
        ({"until": "\n\n", "max_gen_toks": 7}, {"max_new_tokens": 7, "stop": ("\n\n", "zzz")}),
        ({"max_tokens": 7, "guidance": 3, "solver": "heun"}, {"max_new_tokens": 7, "guidance": 3, "solver": "heun"}),
        ({"until": ["a", ""], "stop": ["b"]}, {"stop": ("a", "b")}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4},
            {"temperature": 0.5, "top_p": 0.9, "top_k": 4},
        ),
    ],
)
def test_generation_settings(model: OpenCola, given: dict[str, Any], expected: dict[str, Any]) -> None:
    base = replace(model.sampling, temperature=0.0, stop=("zzz",))
    assert harness.generation(model.sampling, given) == replace(base, **expected)


def test_is_greedy_is_what_the_model_writes(folder: Path, model: OpenCola) -> None:
    asking = OpenCola(str(folder), greedy=True, batch_size=2, **ARGS, temperature=3.0, repetition_penalty=9.0)
    tokenizer, settings = model.tokenizer, replace(model.sampling, temperature=0.0, max_new_tokens=6, stop=())
    blocks = generate_text(model.model, tokenizer, PROMPTS, replace(settings, ignore_eos=True), [0] * len(PROMPTS))
    written: list[list[int]] = [[] for _ in PROMPTS]
    for pieces in blocks:
        for piece in pieces:
            written[piece.sample] += piece.tokens
    others = [[*tokens[:-1], (tokens[-1] + 1) % 256] for tokens in written]
    assert asking._is_own(PROMPTS, written, [0] * len(PROMPTS)) == [True] * len(PROMPTS)
    assert asking._is_own(PROMPTS, others, [0] * len(PROMPTS)) == [False] * len(PROMPTS)
    mixed = [others[1], written[1], [], written[3][:2], others[4]]  # the first is wrong from its first block on
    assert mixed[0][0] != written[0][0]
    assert asking._is_own(PROMPTS, mixed, [0] * len(PROMPTS)) == [False, True, True, True, False]
    # as text, which has to become the same tokens again
    texts = [(prompt, tokenizer.decode(tokens[:2])) for prompt, tokens in zip(PROMPTS, written, strict=True)]
    prompt, text = next(
        (prompt, text)
        for (prompt, text), tokens in zip(texts, written, strict=True)
        if tokenizer.encode_pair(*harness.move_space(prompt, text)) == (tokenizer.encode(prompt), tokens[:2])
    )
    asked = requests("loglikelihood", (prompt, text))
    assert asking.loglikelihood(asked)[0][1] is True and model.loglikelihood(asked)[0][1] is False


def test_context_and_continuation_share_their_tokens(model: OpenCola) -> None:
    tokenizer = model.tokenizer
    hill, space = tokenizer.encode("The hill"), tokenizer.encode(" The")
    assert harness.move_space("The \n", "fox") == ("The", " \nfox") and harness.move_space("", "fox") == ("", "fox")
    assert tokenizer.encode_pair(*harness.move_space("The ", "hill")) == (hill[:1], hill[1:])
    assert tokenizer.encode_pair("", " The") == ([], space)
    # "hi" ends inside the token of " hill": what is scored is "ll" all the same
    assert tokenizer.encode("The hill") != tokenizer.encode("The hi") + tokenizer.encode("ll")
    assert tokenizer.encode_pair("The hi", "ll") == (tokenizer.encode("The hi"), tokenizer.encode("ll"))


def test_nothing_is_certain(model: OpenCola) -> None:
    """Of an empty continuation, and of an empty text."""
    found = model.loglikelihood(requests("loglikelihood", ("The", ""), ("The", " fox"), ("", "")))
    assert found[0][0] == found[2][0] == 0 and found[1][0] < 0
    assert model.loglikelihood(requests("loglikelihood", ("The", "")))[0][0] == 0
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",), ("A",), ("",)))[::2] == [0, 0]
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0]


def test_windows() -> None:
    assert harness.roll([], 4) == [([], [])]
    assert harness.roll([1, 2, 3], 4) == [([], [1, 2, 3])]
    assert harness.roll([*range(10)], 4) == [([], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]


def test_exact_scores_are_asked_for_greediness(model: OpenCola, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the autoregressive family's are."""
    score = model.model.score

    def exact(*args: Any, **fields: Any) -> Any:
        return replace(score(*args, **fields), kind="exact", estimator="autoregressive")

    monkeypatch.setattr(model.model, "score", exact)
    monkeypatch.setattr(model, "_is_own", lambda contexts, continuations, ids: [True] * len(contexts))
    assert model.loglikelihood(requests("loglikelihood", ("The", " fox")))[0][1] is True


def test_cached_answers_are_kept_batch_by_batch(folder: Path, tasks: Path, tmp_path: Path) -> None:
    """What --use_cache keeps when a run is stopped, and that going on gives what not stopping gives."""
    cache = str(tmp_path / "cache")
    first = ask(folder, tasks, "tiny_write", "tiny_choose", use_cache=cache, limit=2)
    whole = ask(folder, tasks, "tiny_write", "tiny_choose", use_cache=cache)
    fresh = ask(folder, tasks, "tiny_write", "tiny_choose")
    for name in ("tiny_write", "tiny_choose"):
        assert answers(whole, name)[:2] == answers(first, name)
        for said, expected in zip(answers(whole, name), answers(fresh, name), strict=True):
            for one, other in zip(said, expected, strict=True):
                assert one == other if name == "tiny_write" else one[0] == pytest.approx(other[0], rel=1e-4)


class Kept:
    """What stands for the harness's cache."""

    def __init__(self) -> None:
        self.answers: list[tuple[Any, ...]] = []

    def add_partial(self, kind: str, args: tuple[Any, ...], answer: Any) -> None:
        self.answers.append((kind, args, answer))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("generate_until", [(prompt, {"until": ["e"], "max_gen_toks": 5}) for prompt in PROMPTS]),
        ("loglikelihood", [(prompt, " fox") for prompt in PROMPTS]),
        ("loglikelihood_rolling", [(text,) for text in ("", *TEXTS, "A")]),
    ],
)
def test_every_batch_goes_to_the_cache(
    folder: Path, kind: str, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, asked = OpenCola(str(folder), batch_size=2, **ARGS), requests(kind, *arguments)
    lm.cache_hook = Kept()
    found = getattr(lm, kind)(asked)
    assert lm.cache_hook.answers == [(kind, request.args, answer) for request, answer in zip(asked, found, strict=True)]
    everything, lm.cache_hook = lm.cache_hook.answers, Kept()
    batches = lm._batches

    def interrupted(*args: Any) -> Any:
        yield next(batches(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(lm, kind)(asked)
    kept = lm.cache_hook.answers
    assert kept == everything[: len(kept)] and len(kept) == (1 if kind == "loglikelihood_rolling" else 2)


def test_what_is_given_holds_over_the_commands_flags(folder: Path) -> None:
    flags = {"batch_size": "8", "max_batch_size": None, "device": "cuda:0"}
    lm = OpenCola.create_from_arg_string(f"pretrained={folder},batch_size=2,seed=5,guidance=3", flags)
    assert (lm.batch_size, lm.sampling.seed, lm.scoring.seed, lm.sampling.guidance) == (2, 5, 5, 3)
    assert lm.sampling.max_new_tokens == 256 and lm.sampling.temperature == 1.0  # the model's own
    assert OpenCola.create_from_arg_obj({"pretrained": str(folder), "max_new_tokens": 9}, flags).batch_size == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model_args name no model"),
        ({"pretrained": "nowhere"}, "no such folder: nowhere"),
        ({"stepps": 3}, "model_args: stepps is no setting of a Cola DLM; there are: .*steps.*score_steps"),
        ({"score_seed": 3}, "score_seed is no setting"),
        ({"steps": "many"}, "model_args: steps is 'many', but must be a whole number"),
        ({"score_solver": "stochastic"}, "model_args: score_solver is 'stochastic', but must be one of"),
        ({"samples": 0}, "model_args: samples is 0, but must be at least 1"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, not 'auto'"),
        ({"max_length": 0}, "max_length must be"),
        ({"greedy": 1}, "greedy is 1, but must be true or false"),
    ],
)
def test_mistakes_in_model_args(folder: Path, args: dict[str, Any], message: str) -> None:
    given = {"pretrained": str(folder)} | args if args else {}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        OpenCola.create_from_arg_obj(given, {"batch_size": 1, "device": None})


def test_settings_are_the_familys(tmp_path: Path, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    config = ARConfig(vocab_size=tokenizer.vocab_size, trunk=LlamaConfig(16, 1, 2, ffn_dim=24))
    layout.PARTS["ar"].save(build.build(config), tmp_path / layout.PARTS["ar"].folder)
    tokenizer.save(tmp_path)
    message = "model_args: steps is no setting of an AR model; there are: max_new_tokens, .*, seed, rows$"
    with pytest.raises(UserError, match=message):
        OpenCola(str(tmp_path), steps=4)
    lm = OpenCola(str(tmp_path), temperature=0.5)
    assert lm.sampling == ARSampling(max_new_tokens=256, temperature=0.5)
    with pytest.raises(UserError, match="generation_kwargs: solver is no setting of an AR model; there are: max_new"):
        harness.generation(lm.sampling, {"until": [], "solver": "heun"})
    with pytest.raises(UserError, match="model_args: block_length is no setting of a Cola DLM"):
        OpenCola(str(folder), block_length=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: num_beams is no setting"),
        ({"top_p": "high"}, "generation_kwargs: top_p is 'high', but must be a number"),
        ({"max_gen_toks": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_mistakes_in_generation_kwargs(model: OpenCola, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate_until(requests("generate_until", ("The", {"until": ["e"]} | given)))


def test_no_chat_template(folder: Path, tasks: Path) -> None:
    lm = OpenCola(str(folder), **ARGS)
    assert lm.chat_template() == ""
    with pytest.raises(ValueError, match="chat=true"):
        lm.chat_template(True)


def test_the_command(
    folder: Path,
    tasks: Path,
    written: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ",".join(f"{name}={value}" for name, value in ARGS.items())
    argv = ["lm_eval", "--model", "opencola", "--model_args", f"pretrained={folder},{settings}", "--batch_size", "4"]
    argv += ["--tasks", "tiny_write", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "-s"]
    # the thousands of tasks that come with it take seconds to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    before = sys.argv
    assert main.main(argv) == 0 and sys.argv is before
    said = capsys.readouterr().out
    assert re.search(r"\| +Tasks +\|", said) and re.search(r"\|tiny_write *\|.*exact_match.*0\.6", said)
    (file,) = tmp_path.glob("out/*/samples_tiny_write_*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])] == written
    (file,) = tmp_path.glob("out/*/results_*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["config"]["sampling"]["steps"] == 2


def test_mistakes_at_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate() -> None:  # what the harness's own does after reading thousands of tasks
        assert sys.argv == ["lm_eval", "--model", "opencola"]
        OpenCola.create_from_arg_string("pretrained=nowhere")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    assert main.main(["lm_eval", "--model", "opencola"]) == 2
    assert capsys.readouterr().err == "error: no such folder: nowhere\n"


@pytest.mark.parametrize("family", ["ar", "llada", "plaid"])
def test_every_family_answers(tmp_path: Path, folder: Path, tasks: Path, family: str) -> None:
    torch.manual_seed(1)
    tokenizer = Tokenizer.load(folder)
    trunk = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)
    config = build.config_class(family)(vocab_size=tokenizer.vocab_size, trunk=trunk)  # type: ignore[call-arg]
    model = build.build(build.sized(config, tokenizer))
    layout.PARTS[family].save(model, tmp_path / layout.PARTS[family].folder)
    tokenizer.save(tmp_path)
    args = {"pretrained": str(tmp_path), **({} if family == "ar" else {"guidance": 1.0, "samples": 3, "seed": 3})}
    found = simple_evaluate(
        model="opencola",
        model_args=args,
        tasks=["tiny_write", "tiny_choose", "tiny_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    settings = build.scoring_class(family)(**({} if family == "ar" else {"samples": 3, "seed": 3}))
    for number, (question, choices, _) in enumerate(QUESTIONS):
        prompt = tokenizer.encode(question.rstrip())
        pairs = [tokenizer.encode_pair(question.rstrip(), own_space(question) + choice) for choice in choices]
        rest = [continuation for _, continuation in pairs]
        expected = model.score([prompt] * len(rest), rest, settings, pad_id=tokenizer.eos_id, ids=[number] * len(rest))
        said = answers(found, "tiny_choose")[number]
        assert [total for total, _ in said] == pytest.approx(expected.total.tolist(), rel=1e-5)
    assert found["results"]["tiny_write"]["exact_match,none"] == 0
    kinds = found["config"]["log_likelihoods"]
    assert kinds == [{"ar": "exact: autoregressive", "llada": "bound: random masking, K = 3"}.get(family, kinds[0])]


def test_greedy_is_found_out_exactly(tmp_path: Path, folder: Path) -> None:
    """Of an AR model: true of its most probable tokens, and of nothing else."""
    torch.manual_seed(2)
    tokenizer = Tokenizer.load(folder)
    trunk = LlamaConfig(width=16, num_layers=1, num_heads=2, ffn_dim=24)
    model = AR(ARConfig(tokenizer.vocab_size, trunk, bos_id=tokenizer.eos_id))
    layout.PARTS["ar"].save(model, tmp_path / layout.PARTS["ar"].folder)
    tokenizer.save(tmp_path)
    asked = OpenCola(str(tmp_path))
    prompt = tokenizer.encode("The fox")
    text = [*prompt]
    for _ in range(4):
        text.append(int(model.logits(torch.tensor([[tokenizer.eos_id, *text]]))[0, -1].argmax()))
    best = text[len(prompt) :]
    other = [*best[:3], (best[3] + 1) % tokenizer.vocab_size]
    assert asked._is_own(["The fox"] * 3, [best, other, best[:2]], [0, 1, 2]) == [True, False, True]
