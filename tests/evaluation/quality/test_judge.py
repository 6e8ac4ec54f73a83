"""Judges: our AR model and the same one through transformers, windows by brute force, and what cannot judge."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import environment
from fake_hub import fake_hub
from tiny import randomise
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from opencola.checkpoints import llama
from opencola.evaluation.quality import judge as judges
from opencola.evaluation.quality.judge import Judge
from opencola.layers.llama import LlamaConfig
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.score import ARScoring
from opencola.text.tokenizer import Tokenizer
from opencola.worlds.stories import story

TEXTS = [story(-1, 1).text, "", "The fox", "Ein Käse.\n", "a", story(-1, 2).text * 2]
BOS = 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((story(0, i).text for i in range(200)), 400)


@pytest.fixture
def model(tokenizer: Tokenizer, tmp_path: Path) -> AR:
    """Kept in the folder `ours`."""
    sizes = LlamaConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=40)
    model = randomise(AR(ARConfig(tokenizer.vocab_size, sizes, bos_id=BOS))).float()
    llama.save(model, tmp_path / "ours")
    tokenizer.save(tmp_path / "ours")
    return model


def through_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """The judge as it is of models that our AR cannot be."""

    def refuse(*args: object) -> None:
        raise ValueError("another kind of model")

    with monkeypatch.context() as patch:
        patch.setattr(llama, "read_config", refuse)
        return judges.load(folder)


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@torch.no_grad()
def test_both_ways_give_the_sum_of_log_softmax(
    model: AR, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = judges.load(tmp_path / "ours"), through_transformers(tmp_path / "ours", monkeypatch)
    prompts = [""] * len(TEXTS)
    first, second = ours(prompts, TEXTS), theirs(prompts, TEXTS)
    for one, other, text in zip(first, second, TEXTS, strict=True):
        ids = tokenizer.encode(text)
        by_hand = 0.0
        for place, token in enumerate(ids):
            logits = model.logits(torch.tensor([[BOS, *ids[:place]]]))[0, -1].double()
            by_hand -= float(logits.log_softmax(-1)[token])
        assert one.nats == pytest.approx(by_hand, abs=1e-4)
        assert other.nats == pytest.approx(by_hand, abs=1e-4)
        assert one.tokens == other.tokens == len(ids) and one.bytes == other.bytes == len(text.encode())
        if ids:
            assert one.nats == pytest.approx(-float(model.score([[]], [ids], ARScoring()).total[0]), abs=1e-4)
    assert first[0].nats > 100 and (first[1].nats, first[1].tokens) == (0, 0)
    assert (ours.context, theirs.context, ours.bos_id, ours.name) == (None, None, BOS, str(tmp_path / "ours"))


def test_prompts_are_given_and_not_judged(model: AR, tokenizer: Tokenizer, tmp_path: Path) -> None:
    judge = judges.load(tmp_path / "ours")
    prompt, text = "The fox ran.", " The fox sat."
    alone = judge([""], [prompt])[0]
    (found, whole) = judge([prompt, ""], [text, prompt + text])
    assert found.nats == pytest.approx(whole.nats - alone.nats, abs=1e-4)
    assert found.tokens == whole.tokens - alone.tokens == len(tokenizer.encode(text))
    assert found.bytes == len(text)
    score = model.score([tokenizer.encode(prompt)], [tokenizer.encode(text)], ARScoring())
    assert found.nats == pytest.approx(-float(score.total[0]), abs=1e-4)


def test_a_token_over_the_seam_counts(model: AR, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = tokenizer.encode("She was clever")
    assert len(tokenizer.encode("She was cl")) > len(whole) - 1, "the seam is inside a token"
    (found,) = judges.load(tmp_path / "ours")(["She was cl"], ["ever"])
    common = 0
    for one, other in zip(tokenizer.encode("She was cl"), whole, strict=False):
        if one != other:
            break
        common += 1
    assert 0 < common < len(whole)
    score = model.score([whole[:common]], [whole[common:]], ARScoring())
    assert (found.tokens, found.bytes) == (len(whole) - common, 4)
    assert found.nats == pytest.approx(-float(score.total[0]), abs=1e-4)


def test_verdicts_do_not_depend_on_company(model: AR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judges.load(tmp_path / "ours")
    prompts = ["", "Once", "", "a", "", "The"]
    together = judge(prompts, TEXTS)
    for size in (1, 150):
        monkeypatch.setattr(judges, "PASS_TOKENS", size)
        for one, other in zip(together, judge(prompts, TEXTS), strict=True):
            assert (one.tokens, one.bytes) == (other.tokens, other.bytes)
            assert one.nats == pytest.approx(other.nats, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("context", [2, 3, 7, 16, 500])
@pytest.mark.parametrize("prompt", ["", "The fox said that she would not go there. "])
def test_windows_by_brute_force(context: int, prompt: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """GPT-2, which cannot see further than its table of positions goes."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": context, "vocab_size": tokenizer.vocab_size}
    model = randomise(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=5, eos_token_id=6))).float()
    model.eval().save_pretrained(tmp_path / "gpt")
    tokenizer.save(tmp_path / "gpt")
    judge = judges.load(tmp_path / "gpt")
    assert judge.context == context
    text = "Once the fox and the bear went to the old hill, and there they sat until it was dark."
    (found,) = judge([prompt], [text])
    whole, first = (
        tokenizer.encode(prompt + text),
        len(tokenizer.encode_pair(prompt, text, whole_tokens=True)[0]),
    )
    inputs, total, seen = [5, *whole], 0.0, []
    for place in range(first, len(whole)):
        # the window that starts at the smallest multiple of half the context and reaches so far
        start = next(s for s in range(0, len(whole), max(1, context // 2)) if s + context > place)
        logits = model(torch.tensor([inputs[start : place + 1]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[whole[place]])
        seen.append(place + 1 - start)
    assert found.nats == pytest.approx(total, abs=1e-3)
    assert found.tokens == len(whole) - first > 20
    assert max(seen) <= context
    assert all(count >= min(place + 1, (context + 1) // 2) for place, count in enumerate(seen, first))


def test_batches_hold_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "PASS_TOKENS", 12)
    windows = [judges.Window(i, [0] * size, [0]) for i, size in enumerate([4, 20, 1, 3, 4, 5, 4])]
    found = [[len(window.inputs) for window in some] for some in judges.batches(windows)]
    assert found == [[1, 3, 4], [4, 4], [5], [20]]
    assert list(judges.batches([])) == []


def remove_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder, _: change_config(folder, bos_token_id=None, eos_token_id=None),
            "config.json has no bos_token_id",
        ),
        (lambda folder, _: change_config(folder, bos_token_id="x"), "bos_token_id is 'x', but must be a whole number"),
        (lambda folder, _: change_config(folder, vocab_size=300), "has 400 ids, but config.json tells of 300"),
        (lambda folder, _: change_config(folder, vocab_size=None), "vocab_size is None"),
        (lambda folder, _: change_config(folder, model_type="nothing"), "holds no causal language model: .*nothing"),
        (lambda folder, _: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder, _: (folder / "tokenizer.json").unlink(), "no tokenizer at"),
        (lambda folder, _: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (remove_transformers, "pip install 'opencola\\[hf\\]'"),
    ],
)
def test_what_cannot_judge(
    damage: Callable[[Path, pytest.MonkeyPatch], Any],
    message: str,
    model: AR,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(tmp_path / "ours", monkeypatch)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        judges.load(tmp_path / "ours")
    assert "\n" not in str(caught.value)


def test_the_end_is_the_beginning_where_there_is_no_other(model: AR, tmp_path: Path) -> None:
    change_config(tmp_path / "ours", bos_token_id=None, eos_token_id=[BOS, 7])
    judge = judges.load(tmp_path / "ours")
    assert judge.bos_id == BOS
    ids = judge.tokenizer.encode(TEXTS[0])
    assert judge([""], TEXTS[:1])[0].nats == pytest.approx(
        -float(model.score([[]], [ids], ARScoring()).total[0]), abs=1e-4
    )


def test_a_model_that_sees_ahead_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=tokenizer.vocab_size, bos_token_id=0)
    randomise(BertLMHeadModel(config)).float().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="holds no causal language model: it sees the tokens behind"):
        judges.load(tmp_path)


def test_a_judge_of_the_hub(model: AR, tmp_path: Path) -> None:
    code = "from opencola.evaluation.quality import judge; print(judge.load('me/judge')([''], ['The fox'])[0].nats)"
    with fake_hub() as hub:
        hub.commits["me/judge"] = []
        hub.commit("me/judge", {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()})
        env = {**environment(), **hub.environment(tmp_path / "home")}
        env.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(judges.load(tmp_path / "ours")([""], ["The fox"])[0].nats, abs=1e-4)
    with pytest.raises(FileNotFoundError, match="no such folder: nowhere"):
        judges.load("nowhere")
