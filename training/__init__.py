"""Training: makes the bundles that `broker_filter` serves. Not part of the installed package.

It uses the service's decoder and preprocessing, so a network is trained on the same tensors that it is served with.
"""

import broker_filter  # noqa: F401 -- first, because it turns off the telemetry of libraries that are imported later
