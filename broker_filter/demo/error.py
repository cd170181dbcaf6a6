"""The error of the demonstration."""

from broker_filter.errors import BrokerFilterError


class DemoError(BrokerFilterError, RuntimeError):
    """The demonstration cannot continue; the message says why."""
