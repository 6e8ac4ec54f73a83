"""Figures of what a model wrote: by hand, by brute force, and their intervals by drawing again."""

import json
import math
import random
import re
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import pytest

from opencola.evaluation.quality.figure import frontier
from opencola.evaluation.quality.mauve import mauve
from opencola.evaluation.quality.measures import (
    Judgement,
    Written,
    by_temperature,
    entries,
    from_record,
    judged,
    longest_repeat,
    to_record,
    variety,
)
from opencola.evaluation.statistics import Entry, Z
from opencola.worlds.stories import story


def named(found: list[Entry]) -> dict[str, Entry]:
    assert len({entry.name for entry in found}) == len(found)
    return {entry.name: entry for entry in found}


def written(index: int = 0, text: str = "", judge: Judgement | None = None, **fields: Any) -> Written:
    ids = tuple(text.encode())
    return Written(
        **{"temperature": 1.0, "index": index, "prompt": "", "text": text, "ids": ids, "judge": judge} | fields
    )


def test_entropy_by_hand() -> None:
    found = named(variety([[1, 1, 2, 2], [5, 5, 5], [], [7, 8, 9]]))
    each = [math.log(2), 0, math.log(3)]
    assert found["token_entropy"].value == pytest.approx(fmean(each))
    assert found["token_entropy"].unit == "nats" and found["token_entropy"].count == 3
    error = stdev(each) / math.sqrt(3)
    assert found["token_entropy"].low == pytest.approx(fmean(each) - Z * error)
    shares = [0.2, 0.2, 0.3, 0.1, 0.1, 0.1]
    assert found["pool_entropy"].value == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert found["pool_entropy"].count == 10
    assert (found["empty"].value, found["empty"].count) == (0.25, 4)
    assert (found["length"].value, found["length"].count) == (2.5, 4)


def test_distinct_and_repetition_by_hand() -> None:
    found = named(variety([[1, 2, 1, 2, 1], [1, 2, 3], [4]]))
    assert found["distinct_1"].value == pytest.approx(4 / 9)
    assert found["distinct_2"].value == pytest.approx(3 / 6)  # 12 21 23 of 12 21 12 21, 12 23
    assert found["distinct_3"].value == pytest.approx(3 / 4)  # 121 212 123 of 121 212 121, 123
    assert found["distinct_4"].value == 1 and found["distinct_4"].count == 2
    assert found["repetition_1"].value == pytest.approx(3 / 9)
    assert found["repetition_2"].value == pytest.approx(2 / 6), "12 of the second text stood in another one"
    assert found["repetition_3"].value == pytest.approx(1 / 4) and found["repetition_3"].count == 4
    assert found["repetition_4"].value == 0
    assert found["longest_repeat"].value == pytest.approx(3 / 3)  # 121, overlapping; nothing; nothing
    short = named(variety([[1, 2]]))
    assert "distinct_2" in short and "distinct_3" not in short and "repetition_3" not in short
    assert short["token_entropy"].low is None, "one sample has no interval"
    assert {*named(variety([[], []]))} == {"empty", "length"}


def test_longest_repeat_by_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = [rng.randrange(rng.choice([1, 2, 3, 9])) for _ in range(rng.randrange(14))]
        pairs = [(i, j, n) for j in range(len(text)) for i in range(j) for n in range(1, len(text) - j + 1)]
        expected = max((n for i, j, n in pairs if text[i : i + n] == text[j : j + n]), default=0)
        assert longest_repeat(text) == expected, text


def test_perplexity_is_a_mean_over_tokens_and_bits_over_bytes() -> None:
    verdicts = [Judgement("j", 10.0, 4, 20), Judgement("j", 1.0, 10, 31), Judgement("j", 0.0, 0, 0)]
    found = named(judged([written(i, judge=verdict) for i, verdict in enumerate(verdicts)]))
    assert found["judge_nats"].value == pytest.approx(11 / 14)
    assert found["judge_perplexity"].value == pytest.approx(math.exp(11 / 14))
    assert found["judge_perplexity"].value != pytest.approx(fmean([math.exp(10 / 4), math.exp(1 / 10)]))
    assert found["judge_bits_per_byte"].value == pytest.approx(11 / math.log(2) / 51)
    assert found["judge_nats"].count == 14 and found["judge_bits_per_byte"].count == 51
    assert "by j" in found["judge_perplexity"].label
    low, high = found["judge_nats"].low, found["judge_nats"].high
    assert low is not None and high is not None
    assert found["judge_perplexity"].low == pytest.approx(math.exp(low))
    assert found["judge_perplexity"].high == pytest.approx(math.exp(high))


def test_interval_of_perplexity_by_the_bootstrap() -> None:
    """Lengths and nats go together, so an interval that took tokens for independent would be far too narrow."""
    rng = random.Random(2)
    verdicts = []
    for _ in range(400):
        tokens, level = rng.randrange(5, 100), rng.uniform(1, 4)
        verdicts.append(Judgement("j", tokens * level + rng.gauss(0, math.sqrt(tokens)), tokens, tokens))
    entry = named(judged([written(i, judge=verdict) for i, verdict in enumerate(verdicts)]))["judge_nats"]
    again = []
    for _ in range(400):
        some = rng.choices(verdicts, k=len(verdicts))
        again.append(sum(one.nats for one in some) / sum(one.tokens for one in some))
    assert entry.low is not None and entry.high is not None
    assert (entry.high - entry.low) / 2 / Z == pytest.approx(stdev(again), rel=0.12)


def test_judges_do_not_mix() -> None:
    verdict = Judgement("a", 1.0, 1, 1)
    with pytest.raises(ValueError, match="1 of 2 samples are judged, by a"):
        judged([written(0, judge=verdict), written(1)])
    with pytest.raises(ValueError, match="2 of 2 samples are judged, by a, b"):
        judged([written(0, judge=verdict), written(1, judge=replace(verdict, name="b"))])
    assert judged([written(0), written(1)]) == []
    huge = named(judged([written(0, judge=Judgement("a", 1e5, 1, 1))]))
    assert math.isfinite(huge["judge_perplexity"].value)


def test_stories_are_judged_whole() -> None:
    tales = [story(-1, i) for i in range(6)]
    wholes = [tale.text for tale in tales]
    samples = []
    for i, tale in enumerate(tales):
        prompt = " ".join(tale.sentences[:2]) if i % 2 else ""
        samples.append(written(i, tale.text[len(prompt) :], prompt=prompt))
    found = named(entries(samples, wholes, story_world=True))
    assert found["mauve_ngram"].value == 1
    assert found["legal_sentences"].count == sum(
        len(tale.sentences) - (2 if i % 2 else 0) for i, tale in enumerate(tales)
    )
    for name in ("legal_sentences", "consistent_stories", "order_legal", "complete", "conflict_free"):
        assert found[name].value == 1 and found[name].unit == "share"
    samples[0] = written(0, tales[0].text + " The moon ate it.")
    samples[1] = written(1, tales[1].text.rsplit(". ", 1)[0] + ".")
    found = named(entries(samples, wholes, story_world=True))
    assert found["legal_sentences"].value == pytest.approx(1 - 1 / found["legal_sentences"].count)
    assert found["consistent_stories"].value == pytest.approx(4 / 6)
    other = [text[::-1] for text in wholes]
    found = named(entries(samples, other))
    assert found["mauve_ngram"].value == mauve([sample.prompt + sample.text for sample in samples], other) < 0.1
    assert {*named(entries(samples))}.isdisjoint({"mauve_ngram", "complete", "judge_nats"})
    with pytest.raises(ValueError, match="no samples"):
        entries([])


def test_prompts_belong_to_the_texts_that_are_compared() -> None:
    tales = [story(-1, i) for i in range(40)]
    wholes, ends = [tale.text for tale in tales], [f" {tale.sentences[-1]}" for tale in tales]
    samples = [
        written(i, end, prompt=whole.removesuffix(end)) for i, (whole, end) in enumerate(zip(wholes, ends, strict=True))
    ]
    assert named(entries(samples, wholes))["mauve_ngram"].value == 1
    assert mauve(ends, wholes) < 0.9


def test_records_come_back() -> None:
    samples = [
        written(3, "ö", Judgement("j", 1.25, 2, 2), temperature=0.7, prompt="A"),
        written(0, "b", temperature=None, ids=(5, 6)),
    ]
    records = [to_record(sample) for sample in samples]
    assert records[0] == {
        "record": "sample", "task": "samples", "temperature": 0.7, "index": 3, "prompt": "A", "text": "ö",
        "ids": (0xC3, 0xB6), "num_tokens": 2, "judge": {"name": "j", "nats": 1.25, "tokens": 2, "bytes": 2},
    }  # fmt: skip
    assert [from_record(json.loads(json.dumps(record)), "x") for record in records] == samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "not a record of a sample: 'NoneType'"),
        ({"num_tokens": 3}, "num_tokens is 3, but there are 2 ids"),
        ({"judge": {"name": "j"}}, "not a record of a sample: .*missing 3"),
    ],
)
def test_damaged_records(change: dict[str, Any], message: str) -> None:
    record = json.loads(json.dumps(to_record(written(0, "ab"))))
    with pytest.raises(ValueError, match=f"f, line 2: {message}"):
        from_record(record | change, "f, line 2")
    del record["text"]
    with pytest.raises(ValueError, match="f: not a record of a sample: 'text'"):
        from_record(record, "f")


def test_temperatures_are_sorted_and_samples_by_index() -> None:
    samples = [written(i, "a", temperature=t) for t in (1.0, None, 0.0, 0.5) for i in (2, 0, 1)]
    found = by_temperature(samples)
    assert [*found] == [None, 0.0, 0.5, 1.0]
    assert [sample.index for sample in found[0.5]] == [0, 1, 2]
    with pytest.raises(ValueError, match="temperature 0.5 have an index twice"):
        by_temperature([*samples, written(1, "b", temperature=0.5)])


def figures(entropy: float, perplexity: float) -> list[Entry]:
    return [
        Entry("token_entropy", "", "nats", entropy, 3, "samples", entropy - 0.1, entropy + 0.1),
        Entry("judge_perplexity", "", "", perplexity, 9, "tokens", perplexity * 0.9, perplexity * 1.2),
    ]


def test_the_drawing_names_models_and_temperatures() -> None:
    models = {
        "first": {None: figures(3.2, 8), 0.25: figures(2, 5), 1.75: figures(3, 20)},
        "second": {None: figures(3.2, 8), 0.85: figures(2.5, 6), 0.95: [figures(2.5, 6)[0]]},
    }
    svg = frontier(models)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"first", "second", "held-out texts", "0.25", "1.75", "0.85"} <= {*texts}
    assert "0.95" not in texts, "without a judge there is no point"
    assert texts.count("held-out texts") == 1
    assert frontier(models) == svg
    assert "held-out texts" not in frontier({"alone": {0.5: figures(2, 5)}})
    assert frontier({"nothing": {0.5: []}}).startswith("<svg")
