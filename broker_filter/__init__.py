"""broker-filter scores the alert packets of sky surveys: from Kafka to Kafka exactly once, or from archived nights."""

import os
from importlib.metadata import version

# onnxruntime reads this variable while it is imported. Without it, the Linux wheel of 1.32 writes a device id below
# ~/.cache and looks up a telemetry host. Python runs this file before any other module of the package, so no module can
# import onnxruntime before it is set; child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = version("broker-filter")
