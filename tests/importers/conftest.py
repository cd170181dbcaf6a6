"""Fixtures that the tests of importers share with those of `scoring`."""

from ..scoring.conftest import make_batch

__all__ = ["make_batch"]
