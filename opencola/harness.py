"""`opencola lm_eval`: the lm-evaluation-harness's own command, with the models of this package in it."""

import importlib.util
import sys
from collections.abc import Sequence


def lm_eval(argv: Sequence[str], description: str) -> None:
    """`opencola lm_eval`. Raises ValueError, with what to do, where the harness is not installed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: opencola lm_eval ARGUMENTS\n\n{description}")
        raise SystemExit(0)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the lm-evaluation-harness is not installed: pip install 'opencola[harness]'")
    from lm_eval.__main__ import cli_evaluate

    from opencola.interop import harness  # noqa: F401 makes the harness know the model

    before, sys.argv = sys.argv, ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
