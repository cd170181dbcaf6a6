"""broker-filter: what astronomers put beside a survey's alert stream to find what matters in it tonight."""

from importlib.metadata import version

__version__ = version("broker-filter")
