"""Say whether there are kernels, and if not, why."""

import sys

from opencola.errors import UserError
from opencola.kernels.build import NotCompiled
from opencola.kernels.library import load

if __name__ == "__main__":
    try:
        print(load())
    except NotCompiled as error:
        sys.exit(f"no kernels, torch does it all: {error}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
