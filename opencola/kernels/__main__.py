"""Say whether there are kernels, and if not, why."""

import sys

from opencola.kernels.library import NotCompiled, compile_library

if __name__ == "__main__":
    try:
        print(f"kernels: {compile_library()}")
    except NotCompiled as error:
        sys.exit(f"no kernels, torch does it all: {error}")
