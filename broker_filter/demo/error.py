"""The error of the demonstration."""


class DemoError(RuntimeError):
    """The demonstration cannot continue; the message says why."""
