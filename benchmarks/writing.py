"""Generation speed of AR and LLaDA beside Hugging Face's LlamaForCausalLM with the same weights, in turns.

    .venv/bin/python -m benchmarks.writing [--model ar|llada] [--size 1M|20M] [--batch N] [--threads N]

Prompt of 64 tokens, 64 new ones: AR greedily with a cache; LLaDA in blocks of 16, a step for 2 tokens, our loop around
either network. One JSON line a row. Sizes are those of `benchmarks.baselines`.
"""

import argparse
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import TRUNKS
from opencola.checkpoints import llama
from opencola.kernels.matmul import in_turns
from opencola.layers.llama import LlamaConfig
from opencola.layers.masks import same_document
from opencola.models.ar.model import AR
from opencola.models.ar.network import ARConfig
from opencola.models.ar.sampling import ARSampling
from opencola.models.llada.model import LLaDA
from opencola.models.llada.network import LLaDAConfig
from opencola.models.llada.sampling import LLaDASampling
from opencola.text.lines import dump

PROMPT, NEW, BLOCK = 64, 64, 16


def hugging_face(model: AR) -> torch.nn.Module:
    """The same model as a LlamaForCausalLM."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        llama.save(model, folder)
        theirs: torch.nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return theirs.eval()


def ar(vocabulary: int, trunk: LlamaConfig, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to write the tokens (B, NEW) that the model holds for the likeliest."""
    ours = AR(ARConfig(vocabulary, trunk)).eval()
    theirs = hugging_face(ours)
    prompts = torch.randint(1, vocabulary, (batch, PROMPT))
    sampling = ARSampling(max_new_tokens=NEW, temperature=0)

    def write() -> Tensor:
        steps = [[block.tokens[0] for block in blocks] for blocks in ours.generate(prompts.tolist(), sampling)]
        return torch.tensor(steps).T

    @torch.inference_mode()
    def write_by_theirs() -> Tensor:
        inputs = torch.cat((torch.full((batch, 1), ours.config.bos_id), prompts), dim=1)
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out: Tensor = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)  # type: ignore[operator]
        return out[:, 1 + PROMPT :]

    return {"ours": write, "transformers": write_by_theirs}


class Theirs(LLaDA):
    """A LLaDA whose network is Hugging Face's."""

    def use(self, network: torch.nn.Module) -> "Theirs":
        """Take the network, which knows [MASK] as one more token."""
        self.theirs = network
        return self

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """As LLaDA's."""
        mask = tokens.new_zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1], dtype=torch.float32)
        if documents is not None:
            mask = mask.masked_fill(~same_document(documents), -torch.inf)
        logits: Tensor = self.theirs(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits[..., :-1]


def llada(vocabulary: int, trunk: LlamaConfig, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to write the tokens (B, NEW) that the model keeps first."""
    config = LLaDAConfig(vocabulary, trunk)
    ours, other = LLaDA(config).eval(), AR(ARConfig(vocabulary + 1, trunk))
    weights = {name: value for name, value in ours.state_dict().items() if name != "head.weight"}
    head = torch.cat((ours.head.weight.detach(), torch.zeros(1, trunk.width)))
    other.load_state_dict(weights | {"head.weight": head})
    theirs = Theirs(config).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.use(hugging_face(other))
    prompts = torch.randint(vocabulary, (batch, PROMPT)).tolist()
    sampling = LLaDASampling(max_new_tokens=NEW, block_length=BLOCK, steps=BLOCK // 2, temperature=0)

    def by(model: LLaDA) -> Callable[[], Tensor]:
        return lambda: torch.cat(
            [torch.tensor([block.tokens for block in blocks]) for blocks in model.generate(prompts, sampling)], dim=1
        )

    return {"ours": by(ours), "transformers": by(theirs)}


def main() -> None:
    """Time the rows that the command line asks for."""
    parser = argparse.ArgumentParser(description="Generation speed of AR and LLaDA beside Hugging Face's.")
    parser.add_argument("--model", choices=("ar", "llada"), help="both when not given")
    parser.add_argument("--size", choices=TRUNKS, help="both when not given")
    parser.add_argument("--batch", type=int, help="samples; 1 and 16 when not given")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the best counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind, make in {"ar": ar, "llada": llada}.items():
        if options.model not in (None, kind):
            continue
        for size in [options.size] if options.size else TRUNKS:
            for batch in [options.batch] if options.batch else (1, 16):
                torch.manual_seed(0)
                ways = make(*TRUNKS[size], batch)
                written = {name: way() for name, way in ways.items()}
                alike = (written["ours"] == written["transformers"]).float().mean().item()
                seconds = in_turns(ways, options.repeats)
                line = {"work": f"write {kind}", "size": size, "batch": batch, "threads": options.threads}
                line |= {"seconds": round(seconds["ours"], 4), "transformers": round(seconds["transformers"], 4)}
                line |= {"times_as_fast": round(seconds["transformers"] / seconds["ours"], 2), "alike": round(alike, 3)}
                print(dump(line), flush=True)


if __name__ == "__main__":
    main()
