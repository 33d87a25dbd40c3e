"""parser: the ArgumentParser of a command, whose help is its module's docstring."""

from __future__ import annotations

import argparse


def command_parser(docstring: str | None, command: str, prog: str, more: str = "") -> argparse.ArgumentParser:
    """A parser without options; the docstring's first paragraph is the description, the rest and `more` are the epilog.

    Args:
        docstring: says `python -m launch.COMMAND` where the help says `prog`.
        prog: how the user called the command.
    """
    summary, _, details = (docstring or "").replace(f"python -m launch.{command}", prog).partition("\n\n")
    return argparse.ArgumentParser(
        prog=prog, description=summary, epilog=details + more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
