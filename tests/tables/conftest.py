"""Fixtures that the tests of the Kafka modules share with those of `streaming`."""

from ..streaming.conftest import make_alerts, make_scored

__all__ = ["make_alerts", "make_scored"]
