"""What makes the bundles that `broker_filter` serves. Not part of the installed package.

Uses the service's own decoder and preprocessing: a network trains on the tensors that it will be served.
"""

import broker_filter  # noqa: F401 -- first, because it turns off the telemetry of libraries that are imported later
