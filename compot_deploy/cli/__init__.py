"""The command line."""

from compot_deploy.cli.entry import main

__all__ = ["main"]
