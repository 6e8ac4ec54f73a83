"""The engine: requests wait, are written together, and leave, whoever else is there."""

import asyncio
import functools
import itertools
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from opencola.kernels.choice import Packs, adding_to
from opencola.models.inputs import check_held
from opencola.models.language_model import LanguageModel
from opencola.models.sampling import Sampling
from opencola.models.stopping import Text, TokenBlock, unfinished
from opencola.models.text_stream import Continuation
from opencola.models.writing import Writing
from opencola.serve.requests import (
    Limits,
    Piece,
    QueueFullError,
    Request,
    Scored,
    StoppingError,
    Stream,
    TooLargeError,
)
from opencola.text.tokenizer import Tokenizer

STOPPING = "the server is stopping"


@dataclass(frozen=True)
class Job:
    """A text that is being written, and where its pieces go."""

    stream: Stream
    text: Text
    continuation: Continuation
    lane: Hashable
    """Alike for texts that can be written side by side."""
    cache_bytes: int
    given: list[int] = field(default_factory=list)
    """Tokens that have been given out."""


class Engine:
    """Writes texts with one model, in a thread of its own.

    Texts whose settings allow it are written side by side: they join at a border of blocks, each with a first block of
    its own time, and leave when they end or are cancelled. Others take turns, block by block.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, limits: Limits | None = None) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits or Limits()
        self.waiting: deque[Stream] = deque()
        self._jobs: dict[int, Job] = {}  # by the number that their texts are marked with
        self._lanes: dict[Hashable, list[Writing]] = {}
        self._numbers = itertools.count()
        self._bytes = functools.lru_cache(1024)(self._bytes_anew)
        self._changed = threading.Condition()
        self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether texts are taken on."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Number of texts that are being written."""
        return len(self._jobs)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of these take."""
        return self._needed(list(self._jobs.values()))

    def submit(self, *requests: Request) -> list[Stream]:
        """Take texts on, all of them or none. To be called in the asyncio loop that reads the streams.

        Raises UserError, of which TooLargeError, QueueFullError and StoppingError.
        """
        for request in requests:
            self.check(request)
        streams = [Stream(request, asyncio.get_running_loop()) for request in requests]
        with self._changed:
            if self._closing:
                raise StoppingError(STOPPING)
            waiting = sum(not stream.cancelled for stream in self.waiting)
            if waiting + len(streams) > self.limits.max_waiting:
                raise QueueFullError(f"{waiting} texts wait already, of at most {self.limits.max_waiting}")
            self.waiting += streams
            self._changed.notify_all()
        return streams

    def check(self, request: Request) -> None:
        """Raise UserError for what could never be written, or never be told."""
        room, needed = self.limits.cache_mib << 20, self._bytes_of(request)
        if needed > room:
            raise TooLargeError(
                f"prompt ({len(request.prompt)} tokens) and max_tokens ({request.sampling.max_new_tokens}) need "
                f"{needed >> 20} MiB of caches, but there are {self.limits.cache_mib}: ask for less"
            )
        if request.logprobs is not None:
            self.model.log_probabilities([0], 1)
        check_held(Text(list(request.prompt), request.sampling, constraint=request.constraint))

    def close(self, timeout: float | None = None) -> bool:
        """Refuse what waits, write to their ends the texts that are begun, and return whether that is done."""
        with self._changed:
            self._closing = True
            self._refuse()
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def abort(self) -> None:
        """Leave off at the next border of blocks; whoever reads a text that is not at its end gets a StoppingError."""
        self._aborting = True
        self.close()

    def _refuse(self) -> None:
        while self.waiting:
            self.waiting.popleft().put(StoppingError(STOPPING))

    def _work(self) -> None:
        try:
            self._go_on()
        finally:  # also after a bug: nobody waits for what will not come
            with self._changed:
                self._closing = True
                self._refuse()
            for job in self._jobs.values():
                job.stream.put(StoppingError(STOPPING))

    def _go_on(self) -> None:
        packs: Packs = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self._closing or self._lanes)
                if self._aborting or not (self.waiting or self._lanes):
                    return
                admitted = self._admit()
            with adding_to(packs):
                self._round(admitted)

    def _admit(self) -> list[Job]:
        """Those that wait and have room, the first first."""
        admitted: list[Job] = []
        self.waiting = deque(stream for stream in self.waiting if not stream.cancelled)
        while self.waiting and len(self._jobs) < self.limits.max_batch:
            job = self._job(self.waiting[0])
            if self._needed([*self._jobs.values(), job]) > self.limits.cache_mib << 20:
                break
            self._jobs[job.text.sample] = job
            admitted.append(job)
            self.waiting.popleft()
        return admitted

    def _job(self, stream: Stream) -> Job:
        request = stream.request
        continuation = Continuation(self.tokenizer, list(request.prompt), request.sampling.stop)
        text = Text(
            list(request.prompt),
            request.sampling,
            next(self._numbers),
            request.sample,
            request.end_ids,
            lambda sample, tokens: continuation.stop(tokens),
            request.watch,
            request.constraint,
        )
        sampling = request.sampling
        company = text.sample if sampling.ends_together else None
        lane = sampling.common, text.constraint is None, company
        return Job(stream, text, continuation, lane, self._bytes_of(request))

    def _bytes_of(self, request: Request) -> int:
        """Bytes of the caches of its text."""
        key = len(request.prompt), request.sampling.max_new_tokens, request.sampling.common
        return self._bytes(*key)

    def _bytes_anew(self, prompt: int, budget: int, common: Sampling) -> int:
        return self.model.cache_bytes(Text([0] * prompt, replace(common, max_new_tokens=budget)))

    def _needed(self, jobs: Sequence[Job]) -> int:
        """Bytes: of those side by side each takes as much as the largest."""
        lanes: dict[Hashable, list[int]] = {}
        for job in jobs:
            lanes.setdefault(job.lane, []).append(job.cache_bytes)
        return sum(len(sizes) * max(sizes) for sizes in lanes.values())

    def _round(self, admitted: Sequence[Job]) -> None:
        """A block more of every text, those that are new first."""
        lanes, self._lanes = self._lanes, {}
        new: dict[Hashable, list[Job]] = {}
        for job in admitted:
            new.setdefault(job.lane, []).append(job)
        for lane, jobs in new.items():
            self._begin(lane, jobs)
        for lane, writings in lanes.items():
            for writing in writings:
                self._step(lane, writing)
        for lane, writings in self._lanes.items():
            joined = writings[0]
            for writing in writings[1:]:
                joined = joined.join(writing)
            self._lanes[lane] = [joined]

    def _begin(self, lane: Hashable, jobs: Sequence[Job]) -> None:
        try:
            pad_id = self.tokenizer.pad_id if jobs[0].stream.request.sampling.shows_padding else 0
            writing = self.model.begin([job.text for job in jobs], pad_id)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job in jobs:
                self._begin(lane, [job])
            return
        self._step(lane, writing)

    def _step(self, lane: Hashable, writing: Writing) -> None:
        """A block more, but of those that are cancelled; what goes on is put back in its lane."""
        going = [row for row, text in enumerate(writing.texts) if not self._jobs[text.sample].stream.cancelled]
        for text in writing.texts:
            if self._jobs[text.sample].stream.cancelled:
                del self._jobs[text.sample]
        if not going:
            return
        if len(going) < len(writing.texts):
            writing = writing.select(going)
        try:
            blocks = writing.step()
        except Exception as error:
            if len(going) == 1:
                self._fail(self._jobs[writing.texts[0].sample], error)
                return
            for row in range(len(going)):  # who it is about is told, and the others go on
                self._step(lane, writing.select([row]))
            return
        for block in blocks:
            self._deliver(block)
        still = [row for row in unfinished(blocks) if blocks[row].sample in self._jobs]
        if still:
            self._lanes.setdefault(lane, []).append(writing if len(still) == len(blocks) else writing.select(still))

    def _fail(self, job: Job, error: Exception) -> None:
        del self._jobs[job.text.sample]
        job.stream.put(error)

    def _deliver(self, block: TokenBlock) -> None:
        job = self._jobs[block.sample]
        try:
            piece = self._piece(job, block)
        except Exception as error:
            self._fail(job, error)
            return
        if block.finished:
            del self._jobs[block.sample]
        job.stream.put(piece)

    def _piece(self, job: Job, block: TokenBlock) -> Piece:
        request, taken = job.stream.request, job.continuation.take(block)
        first = not job.given
        job.given.extend(taken.tokens)
        scores, of_prompt = [], []
        if request.logprobs is not None:
            prompt = list(request.prompt)
            scores = self._scores(prompt + job.given, len(taken.tokens), request.logprobs)
            if first and request.prompt_logprobs:
                of_prompt = self._scores(prompt, len(prompt), request.logprobs)
        return Piece(taken.text, taken.tokens, block.finished, block.states, scores, of_prompt, job.text.forced)

    def _scores(self, text: list[int], count: int, best: int) -> list[Scored]:
        """Of the last tokens of a text."""
        if not count:
            return []
        log_p = self.model.log_probabilities(text, count)
        top = log_p.topk(min(best, log_p.shape[-1]))
        rows = zip(text[-count:], log_p, top.indices.tolist(), top.values.tolist(), strict=True)
        return [Scored(t, float(row[t]), list(zip(i, v, strict=True))) for t, row, i, v in rows]
