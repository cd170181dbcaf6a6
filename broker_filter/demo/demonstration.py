"""The steps of the demonstration, in order: see `run_demo`."""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka.admin import NewTopic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from broker_filter.console import progress, stdout_console
from broker_filter.demo.contact_sheet import draw_contact_sheet
from broker_filter.demo.error import DemoError
from broker_filter.demo.explanations import write_explanations
from broker_filter.demo.night import Night, write_night
from broker_filter.demo.ordinary import write_reference
from broker_filter.demo.report import (
    anomalies_table,
    audit,
    contact_sheet_rows,
    features_table,
    interesting_table,
    kinds_table,
    write_scores,
)
from broker_filter.demo.results import Survey, read_results
from broker_filter.demo.service import FILTERS, PREFIX, TOPICS, ServiceProcess, counts, write_config
from broker_filter.kafka.client import ThrottledErrorLog, admin_client, ensure_topics
from broker_filter.kafka.replay import Replayer, as_fast_as_possible
from broker_filter.local_kafka import embedded_broker, free_ports
from broker_filter.packets.decode import Decoder
from broker_filter.simulate import SCHEMAS
from broker_filter.streaming.archives import read_packets

PARTITIONS = 4
ZTF_PER_LSST = 5
"""Alerts of ZTF per alert of LSST: an alert of LSST takes longer to simulate, and some hundreds show what is scored."""
LOOK_INTERVAL_S = 0.2
LOG_INTERVAL_S = 2.0
STANDSTILL_S = 60.0
"""If the service processes no message for so long, the demonstration gives up."""

log = logging.getLogger(__name__)

Show = Callable[[int, Mapping[str, int], float], None]
"""Shows progress, from: the number of messages sent, the service's counters, and its rate in alerts per second."""


def run_demo(out: Path, n: int, seed: int) -> None:
    """Simulate a night of each survey, send both through a broker and one service, and show the results.

    `n`: alerts of ZTF; LSST has n // ZTF_PER_LSST.

    Writes the files of FILES into the directory `out`. Raises DemoError if a step fails, or if an alert was lost or
    published twice.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / name for name in FILES}
    with (
        tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as scratch,
        embedded_broker(Path(scratch)) as bootstrap,
    ):
        properties = {"bootstrap.servers": bootstrap}
        topics = [NewTopic(topic, num_partitions=PARTITIONS) for topic in TOPICS.values()]
        ensure_topics(admin_client(properties, ThrottledErrorLog(f"brokers {bootstrap}")), topics)
        (port,) = free_ports(1)
        log.info("simulating and scoring other nights, for the reference set of ordinary alerts")
        write_reference(files["ordinary.safetensors"], seed)
        write_config(files["service.yaml"], bootstrap, files["ordinary.safetensors"], port)
        with ServiceProcess(files["service.yaml"], files["service.log"], port) as service:
            log.info("broker on %s; the service starts: http://127.0.0.1:%d/metrics", bootstrap, port)
            sizes: dict[Survey, int] = {"ztf": n, "lsst": max(1, n // ZTF_PER_LSST)}
            with progress("Simulating nights", sum(sizes.values())) as advance:  # while the service starts
                nights = {
                    survey: write_night(files[ARCHIVES[survey]], survey, size, seed, advance)
                    for survey, size in sizes.items()
                }
            service.wait_until_ready()
            rate = _replay(nights, properties, service)
            files["metrics.txt"].write_text(service.metrics())
            service.stop()
        log.info("reading the output topics")
        results = read_results(bootstrap, PREFIX, list(FILTERS))

    kinds = {alert_id: kind for night in nights.values() for alert_id, kind in night.kinds.items()}
    packets = sum(night.packets for night in nights.values())
    write_scores(files["scores.parquet"], results, kinds)
    of_each = " and ".join(f"{size:,} alerts of {survey.upper()}" for survey, size in sizes.items())
    title = f"Simulated nights: {of_each}, scored at {rate:,.0f} a second"
    draw_contact_sheet(files["contact-sheet.png"], title, contact_sheet_rows(results, kinds))
    write_explanations(files["explain.html"], results.anomaly_packets, files["ordinary.safetensors"])
    screen = stdout_console()
    screen.print(*(kinds_table(results, kinds, survey) for survey in nights))
    screen.print(interesting_table(results, kinds), anomalies_table(results, kinds), features_table(results))
    problems = audit(results, packets, counts(files["metrics.txt"].read_text()), screen)
    for name, meaning in FILES.items():
        screen.print(f"  [bold]{files[name]}[/]  {meaning}", soft_wrap=True, highlight=False)
    if problems:
        raise DemoError(f"messages were lost or published twice: {'; '.join(problems)}")


FILES = {
    "contact-sheet.png": "cutouts of alerts that were selected, are anomalies, or were classified as bogus",
    "explain.html": "the anomalies through a lens: which features of the network are active, and from which points",
    "scores.parquet": "table of all alerts with their scores and true kinds",
    "service.yaml": "the service's configuration; replace its brokers by your own to run it",
    "service.log": "the service's log",
    "ordinary.safetensors": "reference set of ordinary alerts, with which anomalies are found",
    "metrics.txt": "the service's metrics at the end",
    "night.tar": "the simulated packets of ZTF; try `broker-filter score` or `broker-filter inspect` on them",
    "lsst-night.tar": f"the simulated packets of LSST; add `--schema-registry {SCHEMAS}`",
}
"""The files that the demonstration writes, and their meaning."""
ARCHIVES: dict[Survey, str] = {"ztf": "night.tar", "lsst": "lsst-night.tar"}


def _replay(nights: Mapping[Survey, Night], properties: Mapping[str, object], service: ServiceProcess) -> float:
    """Send the nights and show progress until the service has processed them. Returns the rate in alerts per second."""
    stop = threading.Event()
    decoder = Decoder(SCHEMAS, columns=())
    replayers = {survey: Replayer(properties, TOPICS[survey], decoder, stop) for survey in nights}
    packets = sum(night.packets for night in nights.values())

    def send() -> None:
        for survey, night in nights.items():
            replayers[survey].replay(read_packets([night.archive]), as_fast_as_possible())

    with ThreadPoolExecutor(1, "replay") as threads, _live(packets) as show:
        sending = threads.submit(send)
        try:
            moved = time.monotonic()
            first: tuple[int, float] | None = (
                None  # count and time when the first alerts were processed: the rate is measured from then on
            )
            consumed, rate = 0, 0.0
            while consumed < packets:
                time.sleep(LOOK_INTERVAL_S)
                if sending.done():
                    sending.result()  # raises what the replay failed with
                account, now = counts(service.metrics()), time.monotonic()
                if account["consumed"] > consumed:
                    consumed, moved = account["consumed"], now
                    first = first or (consumed, now)
                    rate = (consumed - first[0]) / (now - first[1]) if now > first[1] else 0.0
                elif now - moved > STANDSTILL_S:
                    raise DemoError(
                        f"the service has processed {consumed} of {packets} messages, and none in the last "
                        f"{STANDSTILL_S:.0f} s; see its log"
                    )
                show(sum(replayer.deliveries.sent for replayer in replayers.values()), account, rate)
            return rate
        finally:
            stop.set()


@contextmanager
def _live(total: int) -> Iterator[Show]:
    """Show progress bars on a terminal, else log lines. Yields the function to call with new counts."""
    if not sys.stderr.isatty():
        yield _log_lines(total)
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(40),
        MofNCompleteColumn(),
        TextColumn("{task.fields[says]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        sent_bar = bars.add_task("replayed", total=total, says="")
        done_bar = bars.add_task("scored", total=total, says="")

        def show(sent: int, account: Mapping[str, int], rate: float) -> None:
            says = (
                f"[bold green]{rate:,.0f} alerts/s[/]  {account['rejected']} rejected, "
                f"{account['duplicate']} duplicates"
            )
            bars.update(sent_bar, completed=sent)
            bars.update(done_bar, completed=account["consumed"], says=says)

        yield show


def _log_lines(total: int) -> Show:
    last = time.monotonic() - LOG_INTERVAL_S

    def show(sent: int, account: Mapping[str, int], rate: float) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_INTERVAL_S or account["consumed"] == total:
            last = time.monotonic()
            log.info(
                "replayed %d of %d; scored %d, rejected %d, duplicates %d; %.0f alerts/s",
                sent,
                total,
                account["scored"],
                account["rejected"],
                account["duplicate"],
                rate,
            )

    return show
