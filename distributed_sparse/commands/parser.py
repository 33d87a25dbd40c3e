"""parser: build a command's ArgumentParser, with help text from its module docstring."""

from __future__ import annotations

import argparse


def command_parser(docstring: str | None, command: str, prog: str, more: str = "") -> argparse.ArgumentParser:
    """Return a parser without options. The docstring's first paragraph is the description; the rest and `more` are the epilog.

    Args:
        docstring: the module docstring; `python -m launch.COMMAND` in it is replaced by `prog`.
        prog: how the user called the command.
    """
    summary, _, details = (docstring or "").replace(f"python -m launch.{command}", prog).partition("\n\n")
    return argparse.ArgumentParser(
        prog=prog, description=summary, epilog=details + more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
