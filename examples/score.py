"""Log-probabilities of texts, and of answers to choose from: half a minute of one core.

.venv/bin/python examples/score.py [MODEL]
"""

import sys

import opencola

PROMPT = "Once a little girl named Mia lived near the zoo. Mia"
TEXTS = [" met a frog behind the lions.", " lions the behind frog a met."]

model = opencola.load(*sys.argv[1:])

# a Cola DLM has bounds and estimates; the record says which, and how sure it is
(record,) = opencola.score(model, [PROMPT + TEXTS[0]])
print(f"{record['kind']} by {record['estimator']}:")
print(f"{record['log_probability']:.1f} ± {record['standard_error']:.1f} nats, {record['bits_per_byte']:.2f} bits/byte")

# continuations of a prompt: which one does the model expect?
for text, record in zip(TEXTS, opencola.score(model, [(PROMPT, text) for text in TEXTS]), strict=True):
    print(f"{record['log_probability']:8.1f} {text}")
