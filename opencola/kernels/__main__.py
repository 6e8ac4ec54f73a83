"""Say whether there are kernels, and if not, why."""

import sys

from opencola.kernels.library import NotCompiled, load

if __name__ == "__main__":
    try:
        print(f"kernels: {load()[0]}")
    except NotCompiled as error:
        sys.exit(f"no kernels, torch does it all: {error}")
