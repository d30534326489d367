"""The command line. `main` is the console script `penstock`."""

from penstock.client.cli.commands import main

__all__ = ["main"]
