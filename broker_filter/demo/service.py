"""The service as a user runs it: a configuration file, a process, and its metrics over HTTP."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

from broker_filter.demo.error import DemoError
from broker_filter.demo.results import Survey
from broker_filter.kill_with_parent import KillWithParent
from broker_filter.simulate import SCHEMAS

TOPICS: dict[Survey, str] = {"ztf": "ztf_20260225_programid1", "lsst": "lsst-alerts-v10"}
"""The topic of each survey's night."""
PREFIX = "demo"
LENS = "embedder"
"""The lens that explains the anomalies."""
FILTERS = {
    "young-supernova": "default.real > 0.65 and isdiffpos and not sso and distpsnr1 < 8 and sgscore1 < 0.5"
    " and 1 < ndethist < 10 and jdendhist - jdstarthist < 12",
    "active-nucleus": "default.real > 0.65 and not sso and distpsnr1 < 1 and sgscore1 < 0.5"
    " and jdendhist - jdstarthist > 100",
    "fast-mover": "default.real > 0.65 and sso and (elong > 1.2 or trailLength > 1)",
}
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
LOOK_INTERVAL_S = 0.1
LOG_TAIL = 2000
"""Characters of the service's log that an error shows."""

CONFIG = """\
# The configuration of the demonstration. Its broker has ended. To run this file, replace bootstrap_servers by your
# own brokers, then: broker-filter run --config {name}
input:
  bootstrap_servers: "{bootstrap}"
  group_id: demo
  topics: [{topics}]
  start: earliest
  schema_registry: {schemas}   # of LSST's packets; a survey has a registry with an address
output:                      # no bootstrap_servers: the input's cluster
  prefix: {prefix}
  payload: full
models: [default, embedder]
anomalies: {{reference: {reference}, rate: 0.01, lens: {lens}}}
filters:
{filters}
http: {{host: 127.0.0.1, port: {port}}}
"""


def write_config(file: Path, bootstrap: str, reference: Path, port: int) -> None:
    """Write the service file of the demonstration."""
    filters = "\n".join(f'  - name: {name}\n    where: "{where}"' for name, where in FILTERS.items())
    places = {"bootstrap": bootstrap, "topics": ", ".join(TOPICS.values()), "prefix": PREFIX, "port": port}
    paths = {"schemas": SCHEMAS, "reference": reference.resolve(), "lens": LENS}
    file.write_text(CONFIG.format(name=file.name, filters=filters, **places, **paths))


class ServiceProcess:
    """`broker-filter run` as a child process that never outlives its `with` block.

    Every method raises DemoError, with the end of the service's log, if the service has failed.
    """

    def __init__(self, config: Path, log: Path, port: int) -> None:
        self._config = config
        self._log = log
        self._url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> ServiceProcess:
        command = [sys.executable, "-m", "broker_filter", "run", "--config", str(self._config)]
        with self._log.open("wb") as log:
            # In its own session, so that Ctrl-C at the terminal reaches only the demonstration, which ends the service.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._guard = KillWithParent(self._process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.release()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def wait_until_ready(self) -> None:
        """Return when the service reads its topic."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._get("/readyz")
            except OSError as error:
                self._check()
                if time.monotonic() > deadline:
                    raise self._failure(f"is not ready after {START_TIMEOUT_S:.0f} s ({error})") from None
                time.sleep(LOOK_INTERVAL_S)
            else:
                return

    def metrics(self) -> str:
        """Return the service's current metrics in Prometheus' text format."""
        try:
            return self._get("/metrics")
        except OSError as error:
            self._check()
            raise self._failure(f"does not answer ({error})") from None

    def stop(self) -> None:
        """Stop the service with SIGTERM, as an operator would, and wait until it has committed its work."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._failure(f"did not stop within {STOP_TIMEOUT_S:.0f} s") from None
        if self._process.returncode:
            self._check()

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise self._failure(f"ended with status {self._process.returncode}")

    def _failure(self, what: str) -> DemoError:
        return DemoError(f"the service {what}; {self._log} ends:\n{self._log.read_text(errors='replace')[-LOG_TAIL:]}")

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=5) as response:  # noqa: S310 -- our own, on loopback
            text: str = response.read().decode()
        return text


def counts(exposition: str) -> dict[str, int]:
    """Return the numbers of consumed, scored, rejected and duplicate alerts in metrics, summed over their labels."""
    totals = dict.fromkeys(("consumed", "scored", "rejected", "duplicate"), 0)
    for family in text_string_to_metric_families(exposition):
        name = family.name.removeprefix("broker_filter_").removesuffix("_alerts")
        if family.type == "counter" and name in totals:
            totals[name] = int(sum(sample.value for sample in family.samples if sample.name.endswith("_total")))
    return totals
