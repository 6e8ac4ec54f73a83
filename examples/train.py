"""Train a Cola DLM on your own text, and let it write: two minutes of one core, in which it learns letters and endings.

    .venv/bin/python examples/train.py [FILE] [STEPS]

FILE is .txt, .jsonl, .parquet or a folder of these; without it, a copy of README.md. Words and sentences take more text
and thousands of steps: docs/guide/training.md.
"""

import sys
from pathlib import Path

import opencola

if len(sys.argv) > 1:
    source = Path(sys.argv[1])
else:
    source = Path("runs/readme.txt")
    source.parent.mkdir(exist_ok=True)
    source.write_text((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"), encoding="utf-8")

# the keys are those of the recipe's file, recipes/text.yaml, and count in both of its stages
folder = opencola.train_recipe(
    "text",
    out="runs/example",
    overwrite=True,
    data={"source": source},
    tokenizer={"vocab_size": 400},
    train={"steps": sys.argv[2] if len(sys.argv) > 2 else 300},
)
print(opencola.generate(folder, ["The "], max_new_tokens=60)[0])
