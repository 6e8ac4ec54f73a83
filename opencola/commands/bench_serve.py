"""Measure a server under load: times to the first block and between blocks, throughput, refusals.

Of any server of OpenAI's protocol, by its URL; without one, `opencola serve` is started with --model, for the duration.
As many clients as --concurrency says ask again as soon as they are answered; with --rate requests come at random times,
whatever has become of others. The first request of all does not count.

examples:
  opencola bench-serve
  opencola bench-serve http://127.0.0.1:8000 --requests 200 --rate 4 --jsonl load.jsonl
  opencola bench-serve --model runs/mine --concurrency 16 --against generate
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from opencola.checkpoints.hub import from_pretrained
from opencola.commands.terminal import Named, check_apart, read_prompts
from opencola.errors import UserError
from opencola.evaluation.screen import progress_bar, put, table
from opencola.evaluation.writing import PROMPT_SENTENCES, held_out
from opencola.ranges import Count, Positive, Seed, check
from opencola.run import flags
from opencola.serve.admission import KEY
from opencola.serve.against import Comparison, Generator
from opencola.serve.load import Load, Outcome, Server
from opencola.serve.load_figures import figures, to_record
from opencola.serve.process import started
from opencola.storage import growing
from opencola.text.lines import append_objects

ALONE = 16
"""Number of texts, at most, that are written alone to compare times to the first block; they end soon."""
SHORT = 8
"""Tokens of these."""


@dataclass(frozen=True)
class BenchFlags(flags.OutputFlags, Named):
    """What to ask which server for, and how fast. The model is that of a server that is started, and of --against."""

    url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")] = ""
    """Where the server is, such as http://127.0.0.1:8000; without it one is started."""
    api_key: str = ""
    """What the server asks for, if anything; where this is empty, OPENCOLA_API_KEY of the environment."""
    requests: Count = 64
    """Number of requests, each for a text."""
    concurrency: Count = 16
    """Number of clients, each of which asks again when it is answered; one that is refused waits as it is told."""
    rate: Positive | None = None
    """Requests a second in place of --concurrency: they begin at random times, as arrivals of a Poisson process."""
    max_tokens: Count = 64
    """Tokens of a text, at most."""
    prompts_file: Path | None = None
    """File of prompts, as of `opencola generate`, to ask for in turn; without it beginnings of held-out stories."""
    seed: Seed = 0
    """Of the texts, and of the times of --rate."""
    timeout: Positive = 600.0
    """Seconds after which a request has failed."""
    against: Literal["generate"] | None = None
    """In turns with every --concurrency requests, have the model write the same texts as one batch without a server,
    and some alone: the ratios of throughput and of times to the first block."""
    jsonl: Path | None = None
    """Write a record of each request and the figures into this file, one JSON object in a line; one that is there is
    replaced when all are made. Ctrl-C keeps what is done, of x.jsonl in x.draft.jsonl."""

    def __post_init__(self) -> None:
        check(self)
        if self.against and self.rate:
            raise UserError("--against compares batches: leave out --rate")


def command(argv: Sequence[str]) -> None:
    """Run `opencola bench-serve`."""
    options: BenchFlags = flags.parse(BenchFlags, argv, prog="opencola bench-serve", description=__doc__)
    if options.prompts_file is None:
        prompts = [" ".join(tale.sentences[:PROMPT_SENTENCES]) for tale in held_out(min(options.requests, 1000))]
    else:
        check_apart(options.jsonl, options.prompts_file, "prompts")
        prompts = read_prompts(options.prompts_file)
    load = Load(prompts, options.requests, options.max_tokens, options.seed, options.concurrency, options.rate)
    generator = None
    if options.against:
        model, tokenizer, sampling = from_pretrained(options.model)
        settings = replace(sampling, max_new_tokens=load.max_tokens, seed=load.seed, chat=False)
        generator = Generator(model, tokenizer, settings)
    with contextlib.ExitStack() as stack:
        file = None if options.jsonl is None else stack.enter_context(growing(options.jsonl))
        url = options.url or stack.enter_context(started(options.model)).url
        bench = Bench(url, options, load, generator, file)
        try:
            bench.run()
        finally:  # what is done, after Ctrl-C too
            bench.tell()


class Bench:
    """A load on a server, and what has become of it so far."""

    def __init__(
        self, url: str, options: BenchFlags, load: Load, generator: Generator | None, file: TextIO | None
    ) -> None:
        self.options, self.load, self.generator, self.file = options, load, generator, file
        self.url, self.model = url, ""
        self.outcomes: list[Outcome] = []
        self.seconds = 0.0
        self.comparison = Comparison()

    def run(self) -> None:
        """All of it."""
        load, size = self.load, self.load.concurrency if self.generator else self.load.requests
        self.model = asyncio.run(self._named())
        one = replace(load, requests=1, rate=None, max_tokens=min(load.max_tokens, SHORT))
        self._ask(one, 0, lambda outcome: None)
        if self.generator:
            self.generator.write([load.prompt(0)])
        with progress_bar() as bar:
            task = bar.add_task("asking", total=load.requests)

            def done(outcome: Outcome) -> None:
                self._keep(outcome)
                bar.advance(task)

            for number, first in enumerate(range(0, load.requests, size)):
                some = replace(load, requests=min(size, load.requests - first))
                self._in_turns(some, first, number, done)
            if self.generator:
                for number in bar.track(range(min(ALONE, load.requests)), description="alone"):
                    self._in_turns(one, number, number, None)

    def _in_turns(self, load: Load, first: int, turn: int, done: Callable[[Outcome], None] | None) -> None:
        """A round of the server and, if there is one, of the model; every second time the model begins.

        done: what to tell of each outcome; without it there is one text, which is alone.
        """
        outcomes: list[Outcome] = []
        start = self.seconds

        def each(outcome: Outcome) -> None:
            outcome.start += start
            outcomes.append(outcome)
            if done is not None:
                self.seconds = max(self.seconds, outcome.start + outcome.latency)
                done(outcome)

        if self.generator is None:
            self._ask(load, first, each)
            return
        generator = replace(self.generator, sampling=replace(self.generator.sampling, max_new_tokens=load.max_tokens))
        prompts = [load.prompt(number) for number in range(first, first + load.requests)]
        batch = generator.write(prompts) if turn % 2 else None
        self._ask(load, first, each)
        batch = batch or generator.write(prompts)
        outcomes.sort(key=lambda outcome: outcome.id)
        if done is None:
            self.comparison.add_alone(outcomes[0], batch)
        else:
            self.comparison.add(outcomes, batch)

    def _ask(self, load: Load, first: int, done: Callable[[Outcome], None]) -> None:
        async def drive() -> None:
            async with self._server() as server:
                await server.model()  # opens a connection, as clients have that come again
                await server.drive(load, self.model, done, first)

        asyncio.run(drive())

    async def _named(self) -> str:
        async with self._server() as server:
            return await server.model()

    def _server(self) -> Server:
        return Server(self.url, self.options.api_key or os.environ.get(KEY, ""), self.options.timeout)

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._put([to_record(outcome)])

    def _put(self, records: Sequence[dict[str, Any]]) -> None:
        if self.options.json:
            append_objects(sys.stdout, records)
        if self.file is not None:
            append_objects(self.file, records)

    def tell(self) -> None:
        """The figures of what there is."""
        if not self.outcomes:
            return
        found = figures(self.outcomes, self.seconds)
        about = {"url": self.url, "model": self.model, "asked": self.load.requests}
        settings = {name: getattr(self.load, name) for name in ("concurrency", "rate", "max_tokens", "seed")}
        compared = [self.comparison.record()] if self.comparison.texts else []
        self._put([{"record": "summary", **about, **settings, **asdict(found)}, *compared])
        if not self.options.json:
            show(asdict(found), self.load)
            for record in compared:
                show_comparison(record)


def show(found: dict[str, Any], load: Load) -> None:
    """Print figures as tables."""
    how = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} a second"
    print(f"{found['requests']} of {load.requests} requests, {how}, {load.max_tokens} tokens each at most\n")
    grid = table("seconds", "p50", "p90", "p99")
    for name in ("first_block", "between_blocks", "latency"):
        if found[name]:
            grid.add_row(name.replace("_", " "), *(f"{value:.3f}" for value in found[name].values()))
    put(grid)
    print(
        f"\n{found['tokens_per_second']:,.1f} tokens/s, {found['requests_per_second']:.2f} requests/s "
        f"in {found['seconds']:.1f} s; {found['whole']} whole, {found['refused']} refused (429)"
    )
    for error, count in found["errors"].items():
        print(f"{count} failed: {error}")


def show_comparison(record: dict[str, Any]) -> None:
    """Print how the server does against the model by itself."""
    grid = table("", "serve", "generate", "ratio")
    for name, values, ratio in (
        ("tokens/s", record["tokens_per_second"], record["throughput_ratio"]),
        ("first block alone, seconds", record["first_block_alone"], record["first_block_ratio"]),
    ):
        if ratio is not None:
            grid.add_row(name, *(f"{values[side]:.4g}" for side in ("serve", "generate")), f"{ratio:.3f}")
    print()
    put(grid)
    print(f"{record['same_texts']} of {record['texts']} texts are the same")
