"""`broker-filter run`: runs the service until a signal stops it."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import threading

from broker_filter.cli.options import add_config_option

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
"""The signals on which the service drains."""
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that other programs take as a command, for example to reopen log files. By default they end the process."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `run` to the parser."""
    parser = subparsers.add_parser(
        "run",
        help="run the service: Kafka in, scored alerts out",
        examples=("broker-filter config check service.yaml && broker-filter run --config service.yaml",),
        description="Runs the service until SIGTERM, SIGINT or SIGQUIT. The service then commits the alerts in flight "
        "and ends with status 0; a second signal ends it immediately. On SIGHUP the service reads its file again and "
        "continues with it; a file with errors changes nothing. SIGUSR1 and SIGUSR2 are ignored.",
    )
    add_config_option(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from broker_filter.cli.termination import SIGNALLED

    stop, reload = threading.Event(), threading.Event()
    stopping = False

    def on_signal(number: int, _frame: object) -> None:
        nonlocal stopping
        if stopping:
            os._exit(SIGNALLED + number)
        stopping = True
        set_elsewhere(stop)

    def set_elsewhere(event: threading.Event) -> None:
        # In another thread: the main thread, which a handler interrupts, may hold the lock that `set` needs.
        threading.Thread(target=event.set, daemon=True).start()

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, lambda *_: set_elsewhere(reload))  # also under nohup, which ignores SIGHUP
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)

    from broker_filter.config_file import load_again, load_service
    from broker_filter.reload import ServiceFile
    from broker_filter.service import FilterService

    file = ServiceFile(arguments.config, reload, load_again)
    service = FilterService(load_service(file.path), stop, file)
    gc.freeze()  # Start-up objects stay alive; a full collection of them would stop all threads for 0.25 s.
    service.run()
    return 0
