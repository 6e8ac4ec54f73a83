"""Evaluate a model on tasks of the lm-evaluation-harness (pip install 'opencola[harness]').

This is the harness's own command lm_eval, which by itself knows no models of other packages; here it has one named
opencola. --model_args: pretrained (a folder or OWNER/NAME), revision, max_length, greedy, and the settings of
`opencola generate` and `opencola score` by name, where generation's steps, solver, shift and tolerance keep their
names and scoring's are score_steps and so on. `opencola lm_eval run --help` shows what else there is.

examples:
  opencola lm_eval --model opencola --model_args pretrained=runs/mine --tasks arc_easy,wikitext --batch_size 16
  opencola lm_eval --model opencola --model_args pretrained=runs/mine,samples=4,seed=1 --tasks mine --include_path .
"""

import importlib.util
import sys
from collections.abc import Sequence

from opencola.errors import UserError


def command(argv: Sequence[str]) -> None:
    """Run `opencola lm_eval`. Raises UserError, with what to do, where the harness is not installed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: opencola lm_eval ARGUMENTS\n\n{__doc__}")
        raise SystemExit(0)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the lm-evaluation-harness is not installed: pip install 'opencola[harness]'")
    from lm_eval.__main__ import cli_evaluate

    from opencola.evaluation import harness  # noqa: F401 makes the harness know the model

    before, sys.argv = sys.argv, ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
