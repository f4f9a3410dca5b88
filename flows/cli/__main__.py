"""`python -m flows.cli` is `r1`."""

import sys

from flows.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
