"""Texts to token ids by several processes, in order, whatever their number."""

import functools
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from opencola.data.processes import interrupts_held_back
from opencola.text.tokenizer import Tokenizer

CHUNK = 1 << 18  # characters that a process tokenises at a time

Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids of some documents, an end-of-text id behind each, and each document's number of tokens (uint64)."""


def encode_all(texts: Iterator[str], tokenizer: Path, dtype: str, workers: int) -> Generator[Encoded]:
    """Tokenise texts, in order, by so many processes (one: this one), with the tokenizer in a file.

    Raises OSError when a process dies.
    """
    chunks = _chunks(texts)
    if workers == 1:
        loaded = Tokenizer.load(tokenizer)
        yield from (encode(chunk, loaded, dtype) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    ahead: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            with interrupts_held_back():
                ahead.append(pool.submit(_encode_in_worker, chunk, tokenizer, dtype))
            if len(ahead) > 2 * workers:  # all have work, and what is read ahead stays little
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a process that tokenised has died (out of memory?): try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts, of `CHUNK` characters or a little more together."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Encoded:
    """Token ids, of type `dtype` as shards have it, of some documents."""
    documents = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    ids = np.fromiter(itertools.chain.from_iterable(documents), np.dtype(dtype).newbyteorder("<"))
    return ids, np.array([len(document) for document in documents], dtype=np.uint64)


def _encode_in_worker(texts: list[str], tokenizer: Path, dtype: str) -> Encoded:
    return encode(texts, _load(tokenizer), dtype)


_load = functools.cache(Tokenizer.load)  # once in the life of a worker


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
