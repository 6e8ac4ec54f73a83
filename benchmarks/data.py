"""Tokens per second of the data pipeline alone, beside those of training.

    .venv/bin/python -m benchmarks.data [--source stories|jsonl|shards] [--training TOKENS_PER_SECOND] [--threads N]

Batches of the demo recipe's prior stage, from generated stories, from the same stories in a .jsonl file and from shards
of them. Training is forward and backward of that stage's loss, without the optimizer, which flatters it. One JSON line
a source; tokenizer_threads is what the tokenizer may use.
"""

import argparse
import itertools
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import stepping
from benchmarks.floor import best_seconds
from opencola.data.corpus import Corpus, CorpusConfig
from opencola.data.shard_writer import Order, tokenise
from opencola.data.sources import one_pass
from opencola.models import build
from opencola.run import recipe as recipes
from opencola.text.lines import dump, write_objects
from opencola.text.tokenizer import Tokenizer

SOURCES = ("stories", "jsonl", "shards")


def make(folder: Path, documents: int, vocab_size: int) -> dict[str, str]:
    """Stories in a .jsonl file and in shards; the name of every source."""
    texts = itertools.islice(one_pass("stories", 0), documents)
    file = folder / "stories.jsonl"
    write_objects(file, ({"text": text} for text in texts))
    for _ in tokenise(Order(str(file), vocab_size=vocab_size), folder / "shards"):
        pass
    return {"stories": "stories", "jsonl": str(file), "shards": str(folder / "shards")}


def tokens_per_second(corpus: Corpus, num_tokens: int) -> float:
    """Of the best of three readings of so many tokens, the first batch not counted."""
    per_batch = next(corpus).tokens.numel()
    batches = -(-num_tokens // per_batch)
    seconds = best_seconds(lambda: [next(corpus) for _ in range(batches)], 3)
    return batches * per_batch / seconds


def training_tokens_per_second(recipe: recipes.Recipe, vocab_size: int) -> float:
    """Of forward and backward of a stage's loss, on random tokens."""
    vae = replace(recipe.model.vae, vocab_size=vocab_size)
    model = build.build(replace(recipe.model, vae=vae))
    corpus = Corpus(recipe.data, Tokenizer.train(itertools.islice(one_pass("stories", 0), 2000), vocab_size), 0)
    batch = next(corpus)

    step = stepping(model, lambda: model.loss(batch).total)
    step()
    return batch.tokens.numel() / best_seconds(step, 10)


def main() -> None:
    """Time the sources that the command line asks for."""
    parser = argparse.ArgumentParser(description="Speed of the data pipeline.")
    parser.add_argument("--source", choices=SOURCES, help="all when not given")
    parser.add_argument("--training", type=float, help="tokens/s of training; measured when not given")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to read")
    parser.add_argument("--documents", type=int, default=20_000, help="stories in the .jsonl file and the shards")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = dict(recipes.read("demo", [], build.config_class, build.sampling_class))["prior"]
    vocab_size = recipe.tokenizer.vocab_size
    training = options.training or training_tokens_per_second(recipe, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        places = make(Path(folder), options.documents, vocab_size)
        tokenizer = Tokenizer.load(places["shards"])
        for source in [options.source] if options.source else SOURCES:
            config: CorpusConfig = replace(recipe.data, source=places[source])
            rate = tokens_per_second(Corpus(config, tokenizer, 0), options.tokens)
            line = {
                "work": "data",
                "source": source,
                "packing": config.packing,
                "length": config.length,
                "batch": config.batch_size,
                "threads": options.threads,
                "tokenizer_threads": int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count() or 1)),
                "tokens_per_second": round(rate),
                "training_tokens_per_second": round(training),
                "over_training": round(rate / training, 1),
            }
            print(dump(line), flush=True)


if __name__ == "__main__":
    main()
