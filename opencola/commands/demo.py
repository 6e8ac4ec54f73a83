"""Train a tiny model on generated stories, in minutes, and measure what it writes.

Runs the recipe `demo` and then writes report.html and metrics.json beside the model. Whatever the recipe sets can
be set here, too, as --KEY VALUE; `opencola train demo --help` lists it all.

examples:
  opencola demo
  opencola demo --out runs/other --seed 1
  opencola demo --resume
"""

import shlex
import time
from collections.abc import Sequence

from opencola.run import flags
from opencola.run.flags import RunFlags


def command(argv: Sequence[str]) -> None:
    """Run `opencola demo`."""
    started = time.time()
    options, settings = flags.parse(RunFlags, argv, prog="opencola demo", description=__doc__, return_unknown_args=True)
    from opencola.run import demo, start  # loads torch: not for the help text

    out = start.train("demo", settings, options, shlex.join(["opencola", "demo", *argv]))
    demo.finish(out, started=None if options.resume else started)
