"""A bundle of one network for tests that need one, whatever networks `default` consists of."""

from __future__ import annotations

from broker_filter.scoring.bundle import open_bundle

ZTF_NETWORK = str(open_bundle("default").part("ztf").directory)
"""Directory of the network of `default` for ZTF: a bundle of its own, which takes no alerts of LSST."""
