"""Runs the web server of the page until the process is asked to end."""

from __future__ import annotations

import socket

import uvicorn

from broker_filter.watch.access import access_to
from broker_filter.watch.server import Application, Night, Receive, Scope, Send, make_app

MAX_CONNECTIONS = 200
"""The most connections and requests at a time; a browser opens six for a page."""
END_S = 1
"""How long requests in flight are waited for at the end."""


def serve(night: Night, listener: socket.socket, host: str) -> None:
    """Serve the page on a socket until SIGINT or SIGTERM, and print its address first."""
    access, address = access_to(host, listener.getsockname()[1])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await pages(scope, receive, send)

    options = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=END_S,
    )
    server = uvicorn.Server(options)
    pages: Application = make_app(night, access, lambda: server.should_exit)
    print(f"{address}\nThe page is there until you press Ctrl-C.", flush=True)  # noqa: T201 - the command's result
    server.run(sockets=[listener])
