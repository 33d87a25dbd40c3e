"""Write the demo checkpoint: ``python -m launch.make_demo_checkpoint --output DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the recall model, a small Llama made without training.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save_recall_checkpoint(arguments.output, arguments.seed)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
