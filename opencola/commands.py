"""The commands that need no more than their flags: what they offer, and where they are; `cli` has the others.

Each loads what it needs when it runs, so that help comes at once.
"""

from collections.abc import Callable, Sequence


def help_of(function: Callable[..., None]) -> str:
    """A command's docstring, without its indentation."""
    first, *rest = (function.__doc__ or "").rstrip().split("\n")
    return "\n".join([first, *(line.removeprefix("    ") for line in rest)])


def generate(argv: Sequence[str]) -> None:
    """Continue prompts.

    A single prompt is continued before your eyes, several are printed as they are done. The same seed gives the same
    texts, alone or in any batch.

    examples:
      opencola generate --prompt "Once upon a time"
      opencola generate --model runs/demo --prompt "The fox" "The bear" --steps 32 --seed 7
      opencola generate --prompts-file prompts.txt --jsonl out.jsonl
    """
    from opencola import console

    console.generate(argv, help_of(generate))


def chat(argv: Sequence[str]) -> None:
    """Type beginnings of texts, and read how the model goes on; or talk with a model of conversations.

    examples:
      opencola chat
      opencola chat --model runs/sft
      opencola chat --model runs/demo --max-new-tokens 100
    """
    from opencola import chat as command

    command.chat(argv, help_of(chat))


def export(argv: Sequence[str]) -> None:
    """Write a trained model, with tokenizer, sampling settings and a model card, into a folder of its own.

    The folder has the layout of the public Cola DLM release, which `opencola generate --model` reads.

    examples:
      opencola export --model runs/demo --to models/stories --dtype bf16
      opencola export --model runs/demo --to models/stories --push OWNER/stories --private
    """
    from opencola.export import command

    command(argv, help_of(export))


def tokenize(argv: Sequence[str]) -> None:
    """Turn text into shards of token ids, which training reads without tokenising, whatever their size.

    SOURCE is what --data.source takes: a .txt, .jsonl or .parquet file, a folder of these, hf:NAME[:CONFIG][@SPLIT],
    bible or stories. After Ctrl-C, a crash or a full disk the same command goes on; it also checks what is there, and
    writes anew what is damaged.

    examples:
      opencola tokenize texts/ --to tokens --vocab-size 8192
      opencola tokenize hf:roneneldan/TinyStories --to tokens --tokenizer runs/mine --workers 8
      opencola train text --data.source tokens --out runs/mine
    """
    from opencola import tokenize as command

    command.tokenize(argv, help_of(tokenize))


def latents(argv: Sequence[str]) -> None:
    """Measure how a model's latents hold text: how much noise they survive, what they cost, how they are spread.

    Prints the figures, and writes them with their intervals to latents.jsonl, and as a drawing to latents.svg.

    examples:
      opencola latents
      opencola latents --model runs/mine --data valid.txt --length 128 --out runs/mine/latents
      opencola latents --model runs/demo/vae --sequences 50 --seed 1
    """
    from opencola import latents as command

    command.latents(argv, help_of(latents))


def inspect(argv: Sequence[str]) -> None:
    """Show what posterior, prior and decoder make of every token of a text, each given the true text before it.

    Prints a line for each token, and writes them to inspect.jsonl; slice.svg shows the latents around a few of them:
    samples of posterior and prior, and what the decoder reads where.

    examples:
      opencola inspect "Once a little girl named Mia lived near the lake."
      opencola inspect "The fox ran to the hill." --model runs/demo --tokens 1 4 --guidance 1 --out runs/demo/fox
    """
    from opencola import inspect_text as command

    command.inspect(argv, help_of(inspect))


def diagnose(argv: Sequence[str]) -> None:
    """Find the link of a model that loses text: VAE, prior, normalisation, sampler, guidance, tokens, prompts, history.

    Each is measured by two conditions that differ in it alone, on stories of the story world and on nests of brackets,
    in failures per token. Prints them with their intervals, names the link at fault, and writes all of it to
    diagnose.jsonl, and the losses as a drawing to diagnose.svg.

    examples:
      opencola diagnose
      opencola diagnose --model runs/demo --num-stories 64 --out runs/demo/diagnose
      opencola diagnose --model runs/demo --guidance 7 --steps 4
    """
    from opencola import diagnose as command

    command.diagnose(argv, help_of(diagnose))


def score(argv: Sequence[str]) -> None:
    """Score texts: log-probabilities, as bounds or estimates, labelled by how they were computed.

    Prints the chosen estimate with its standard error, the terms of the ELBO, perplexity and bits per byte; --jsonl
    keeps them all, by block too. Ctrl-C keeps what is done.

    examples:
      opencola score texts.txt
      opencola score texts.jsonl --model runs/demo --jsonl scores.jsonl --divergence exact --samples 32
      opencola score answers.jsonl --conditional joint --estimator elbo --solver dopri5 --tolerance 1e-3
    """
    from opencola import score as command

    command.score(argv, help_of(score))


def report(argv: Sequence[str]) -> None:
    """Make tables and drawings of evaluations, from their results files alone.

    RESULTS are files that `opencola evaluate` wrote. Two or more models are set side by side, and compared in pairs on
    the records that both have answered. Prints the tables, and writes them as a page with some records, as Markdown,
    and all figures as JSON lines.

    examples:
      opencola report runs/mine/results.jsonl
      opencola report cola.jsonl ar.jsonl llada.jsonl --out runs/comparison
    """
    from opencola import report as command

    command.report(argv, help_of(report))


def quality(argv: Sequence[str]) -> None:
    """Measure what a model writes, at several temperatures: perplexity under a judge, variety, likeness to texts.

    Prints the figures; samples.jsonl holds the texts, quality.jsonl the figures with their intervals, and quality.svg
    shows perplexity against entropy, where there is a judge. Held-out texts are measured beside them.

    examples:
      opencola quality
      opencola quality --model runs/mine --judge openai-community/gpt2 --reference valid.txt --max-new-tokens 128
      opencola quality --model runs/demo --temperatures 0 0.5 1 --num-samples 100 --prompted --out runs/demo/quality
    """
    from opencola import quality as command

    command.quality(argv, help_of(quality))


def lm_eval(argv: Sequence[str]) -> None:
    """Evaluate a model on tasks of the lm-evaluation-harness (pip install 'opencola[harness]').

    This is the harness's own command lm_eval, which by itself knows no models of other packages; here it has one named
    opencola. --model_args: pretrained (a folder or OWNER/NAME), revision, max_length, greedy, and the settings of
    `opencola generate` and `opencola score` by name, where generation's steps, solver, shift and tolerance keep their
    names and scoring's are score_steps and so on. `opencola lm_eval run --help` shows what else there is.

    examples:
      opencola lm_eval --model opencola --model_args pretrained=runs/mine --tasks arc_easy,wikitext --batch_size 16
      opencola lm_eval --model opencola --model_args pretrained=runs/mine,samples=4,seed=1 --tasks mine --include_path .
    """
    from opencola import harness

    harness.lm_eval(argv, help_of(lm_eval))


def evaluate(argv: Sequence[str]) -> None:
    """Have a model answer benchmarks and continue stories, and judge what it writes.

    Every record goes to results.jsonl: prompt, generation, verdict. What depends on the order of work is not in there:
    the file is the same at any --batch-size, by any number of --processes, and after any interruption, from which the
    same command goes on. Settings of generation are the model's own, but for 32 new tokens at temperature 0.

    examples:
      opencola evaluate
      opencola evaluate --model runs/mine --data benchmarks/ --out runs/mine/evaluation
      opencola evaluate --model runs/mine --data benchmarks/ --tasks mmlu obqa --limit 100 --likelihood --processes 2
    """
    from opencola import evaluate as command

    command.evaluate(argv, help_of(evaluate))
