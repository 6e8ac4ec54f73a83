"""Continue prompts with the model that comes along, or another: seconds of one core.

.venv/bin/python examples/generate.py [MODEL]
"""

import sys

import opencola

PROMPTS = ["Once a little girl named Mia lived near the zoo.", "One sunny day,"]

model = opencola.load(*sys.argv[1:])

# as it is written, block by block
print(PROMPTS[0], end="", flush=True)
for text in opencola.stream(model, PROMPTS[0], seed=1):
    print(text, end="", flush=True)
print("\n")

# several at once; a seed and a prompt's place in the list decide its text
for prompt, text in zip(PROMPTS, opencola.generate(model, PROMPTS, seed=2, max_new_tokens=40), strict=True):
    print(f"{prompt}|{text}\n")
