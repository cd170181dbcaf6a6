"""Fixtures that the tests of the Kafka modules share with those of `streaming`."""

from ..streaming.conftest import four_packets, make_alerts, make_scored

__all__ = ["four_packets", "make_alerts", "make_scored"]
