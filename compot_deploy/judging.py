"""Where version 0.1 had its runners: programs that import them by this name keep working."""

from compot_deploy.accuracy.runners import RUNNERS

__all__ = ["RUNNERS"]
