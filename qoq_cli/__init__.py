"""The command line of qoq: arguments, rendering, progress, exit codes."""

__version__ = "0.1.0"
