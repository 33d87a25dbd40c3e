"""`distributed-sparse plan`, of a checkout that need not be installed."""

import sys
from pathlib import Path

if not __package__:  # run as a file: let the repository root take the place of launch/ on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from distributed_sparse.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
