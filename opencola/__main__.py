"""`python -m opencola`: the command `opencola`."""

import sys

from opencola.cli import main

sys.exit(main())
