"""The model that comes with the package: it is there, small, and still writes legal sentences."""

from pathlib import Path

from opencola import console
from opencola.interop import official
from opencola.models.text_stream import generate_text
from opencola.text.stories import check, split_sentences, story


def test_is_at_most_8_mb() -> None:
    assert 0 < sum(path.stat().st_size for path in Path(console.SHIPPED).rglob("*")) <= 8e6


def test_writes_legal_sentences() -> None:
    model, tokenizer = console.load(console.SHIPPED)
    stories = [story(-5, index).text for index in range(8)]
    prompts = [" ".join(split_sentences(text)[:2]) for text in stories]
    texts = list(prompts)
    for pieces in generate_text(model, tokenizer, prompts, official.load_sampling(console.SHIPPED)):
        for piece in pieces:
            texts[piece.sample] += piece.text
    legal = [mark for text in texts for mark in check(text).legal[2:]]
    assert len(legal) >= 16
    assert sum(legal) / len(legal) >= 0.85
