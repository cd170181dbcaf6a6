"""Fixtures shared by the tests of importers and of `scoring`."""

from ..scoring.conftest import make_batch

__all__ = ["make_batch"]
