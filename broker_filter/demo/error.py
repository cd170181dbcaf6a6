"""What can go wrong in the demonstration."""


class DemoError(RuntimeError):
    """The demonstration cannot go on; the message says why, and is for a person."""
