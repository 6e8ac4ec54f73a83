"""`python -m opencola`: the command `opencola`."""

import sys

from opencola.commands.main import main

sys.exit(main())
