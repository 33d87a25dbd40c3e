"""cli: the console script `distributed-sparse COMMAND ...`. Imports only the module of the chosen command."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from distributed_sparse import __version__

COMMANDS = {
    "generate": "complete a prompt, or the rows of a JSONL file",
    "evaluate": "compare sparse methods with dense attention on a task suite",
    "plan": "compute bytes read, memory and expected times of an engine from its model's shape",
    "bench": "time kernels, a layer, decode, steps or serving",
    "scale": "time the engine over tensor parallel sizes, batches and contexts",
    "chaos": "run requests while shards, nodes and the Driver are killed",
    "demo": "make a small checkpoint and decode it on two Ray actors of this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the arguments after its name; return its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="distributed-sparse",
        description="Tensor-parallel sparse-attention decoding of Hugging Face models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
        + "\n\n`distributed-sparse COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="a command listed below, followed by its options")
    command = parser.parse_args(given[:1]).command
    return importlib.import_module(f"distributed_sparse.commands.{command}").main(given[1:], f"distributed-sparse {command}")
