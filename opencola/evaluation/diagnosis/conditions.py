"""The conditions of `opencola diagnose`: a model at a task, its links coming in one by one (model.md §§2-5)."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opencola.errors import UserError
from opencola.evaluation.diagnosis import tasks
from opencola.evaluation.diagnosis.tasks import Cut, Task
from opencola.evaluation.diagnosis.verdicts import Latents, Tally, tally
from opencola.evaluation.statistics import Share, share
from opencola.layers.device import device
from opencola.models.cola import links as diagnosis
from opencola.models.cola.model import Cola
from opencola.models.cola.sampling import ColaSampling, FirstBlock
from opencola.text.tokenizer import Tokenizer

GUIDANCES = (1.0, 2.0, 4.0, 7.0)
STEPS = (0.25, 0.5, 2.0)  # of the model's own
FIRST_BLOCKS: tuple[FirstBlock, ...] = ("clean", "partial", "left_pad", "right_pad")


@dataclass(frozen=True)
class Bench:
    """A model at a task. `tokens` (B, L): the texts, filled up with end-of-text tokens, which `scored` leaves out;
    `cuts`: places between blocks, `chunk` tokens each; `fitted`: the model with that normalisation at which the prior's
    first blocks are spread as the data's."""

    model: Cola
    tokenizer: Tokenizer
    task: Task
    sampling: ColaSampling
    places: int
    batch_size: int
    chunk: int
    tokens: Tensor
    scored: Tensor
    cuts: list[Cut]
    latents: Latents
    fitted: Cola

    def tally(self, cuts: Sequence[Cut], written: Sequence[Sequence[int]]) -> Tally:
        """The verdicts on what was written at the cuts."""
        runs = [tasks.judge(self.task, self.tokenizer, cut, new) for cut, new in zip(cuts, written, strict=True)]
        return tally(runs, len(self.task.texts))

    def blocks(self, model: Cola, cuts: Sequence[Cut], sampling: ColaSampling) -> Tally:
        """Of the block that is generated at every cut."""
        before = [cut.before for cut in cuts]
        return self.tally(cuts, diagnosis.next_blocks(model, before, sampling, self.pad_id(sampling), self.batch_size))

    def pad_id(self, sampling: ColaSampling) -> int:
        """The padding token, where padding is seen; other settings do without."""
        return self.tokenizer.pad_id if sampling.shows_padding else 0


def prepare(
    model: Cola, tokenizer: Tokenizer, task: Task, sampling: ColaSampling, places: int = 8, batch_size: int = 256
) -> Bench:
    """A model at a task, with its texts encoded and the spread of first blocks measured.

    Raises UserError for latents that are not finite.
    """
    # a text ends where its language says so: neither chat nor a stop string has a part in that; and what is diagnosed
    # is what the prior drafts, not what its trunk makes of that
    own = replace(sampling, chat=False, stop=(), verify="off")
    chunk = model.dit.config.block_size * model.vae.config.patch_size
    rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in task.texts]
    width = -(-max(map(len, rows)) // chunk) * chunk
    tokens = torch.tensor([row + [tokenizer.eos_id] * (width - len(row)) for row in rows], device=device())
    data, prior = diagnosis.first_spreads(model, tokens[:, :chunk], diagnosis.settings(own)["prior"])
    if not all(0 < spread.overall < math.inf for spread in (data, prior)):
        raise UserError("the model's latents are not finite, or all alike: its weights are damaged, or diverged")
    fitted = diagnosis.renormalised(model, data, prior)
    lengths = torch.tensor([[len(row)] for row in rows], device=tokens.device)
    scored = torch.arange(width, device=tokens.device) < lengths
    slopes = [diagnosis.velocity_slope(flow, tokens, scored, own.seed) for flow in (model, fitted)]
    channels = [moment.tolist() for moment in (data.mean, data.deviation, prior.mean, prior.deviation)]
    latents = Latents(channels[:2], channels[2:], *slopes)
    cuts = tasks.cuts(task, tokenizer, places, chunk, False, own.seed)
    return Bench(
        model=model, tokenizer=tokenizer, task=task, sampling=own, places=places, batch_size=batch_size, chunk=chunk,
        tokens=tokens, scored=scored, cuts=cuts, latents=latents, fitted=fitted,
    )  # fmt: skip


def conditions(bench: Bench) -> Iterator[tuple[str, Tally]]:
    """Every condition by name, as it is measured. One whose settings are those of the one before has its figures."""
    model, own, cuts, chunk = bench.model, bench.sampling, bench.cuts, bench.chunk
    guessed = tasks.blind(cuts, own.seed)
    yield "blind", bench.tally([cut for cut, _ in guessed], [[token] for _, token in guessed])
    _, sample = diagnosis.given_back(model, bench.tokens, own.seed)
    yield "decoded", bench.tally(cuts, [sample[cut.text, len(cut.before) :][:chunk].tolist() for cut in cuts])
    settings = diagnosis.settings(own)
    fitted = now = bench.blocks(model, cuts, settings["prior"])
    if bench.latents.misplaced:
        fitted = bench.blocks(bench.fitted, cuts, settings["prior"])
    yield (
        "prior",
        min(fitted, now, key=lambda condition: condition.rate.value),
    )  # samples may be misplaced for another reason
    yield "normalised", now
    before = settings["prior"]
    for name in ("steps", "guidance", "choice"):
        if settings[name] != before:
            now = bench.blocks(model, cuts, settings[name])
        yield name, now
        before = settings[name]
    if chunk > 1:
        yield "inside", bench.blocks(model, inside(bench), own)
    yield from free(bench)


def inside(bench: Bench) -> list[Cut]:
    """Places inside blocks."""
    return tasks.cuts(bench.task, bench.tokenizer, bench.places, bench.chunk, True, bench.sampling.seed)


def free(bench: Bench) -> Iterator[tuple[str, Tally]]:
    """The model's own texts up to their first failure, and blocks generated anew at places of them, drawn, where the
    history is the encoder's."""
    cuts, own = tasks.beginnings(bench.task, bench.tokenizer), bench.sampling
    written = diagnosis.write(
        bench.model, [cut.before for cut in cuts], own, bench.pad_id(own), bench.batch_size,
        lambda number, new: tasks.is_over(bench.task, bench.tokenizer, cuts[number], new),
    )  # fmt: skip
    runs = [tasks.judge(bench.task, bench.tokenizer, cut, new) for cut, new in zip(cuts, written, strict=True)]
    begun = [tasks.places(cut, new, run, bench.chunk) for cut, new, run in zip(cuts, written, runs, strict=True)]
    visited = [place for places in begun for place in places]
    chosen = random.Random(own.seed).sample(visited, min(len(visited), bench.places * len(cuts)))
    yield "clean", bench.blocks(bench.model, chosen, own)
    yield "free", tally(runs, len(cuts))


def sweep(bench: Bench) -> Iterator[tuple[str, Tally]]:
    """The model's own settings with one of them changed, at the same places."""
    own = bench.sampling
    for guidance in GUIDANCES:
        yield f"guidance {guidance:g}", bench.blocks(bench.model, bench.cuts, replace(own, guidance=guidance))
    for steps in (max(1, round(factor * own.steps)) for factor in STEPS):
        yield f"steps {steps}", bench.blocks(bench.model, bench.cuts, replace(own, steps=steps))
    for mode in FIRST_BLOCKS if bench.chunk > 1 else ():
        yield f"first_block {mode}", bench.blocks(bench.model, inside(bench), replace(own, first_block=mode))


def accuracies(bench: Bench) -> dict[str, Share]:
    """Of the VAE's round trip: tokens that come back right, and texts that the language still has."""
    shares = {}
    back = diagnosis.given_back(bench.model, bench.tokens, bench.sampling.seed)
    for name, tokens in zip(("mean", "sample"), back, strict=True):
        right = (tokens == bench.tokens)[bench.scored]
        texts = [row[scored][:-1].tolist() for row, scored in zip(tokens, bench.scored, strict=True)]
        shares[f"tokens_from_{name}"] = share(int(right.sum()), len(right))
        shares[f"texts_from_{name}"] = share(
            sum(map(bench.task.is_whole, map(bench.tokenizer.decode, texts))), len(texts)
        )
    return shares
