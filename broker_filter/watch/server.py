"""The web application: the page, its data, live counts, and labels.

It answers only requests that a browser makes for the page itself: the Host header is checked against DNS rebinding, a
label needs the page's token and the same origin, and the content security policy runs nothing but the page's own
files. No path of a request touches the disk.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from http.cookies import CookieError, SimpleCookie
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from broker_filter.watch.access import Access
from broker_filter.watch.chosen import Chosen
from broker_filter.watch.detail import Details
from broker_filter.watch.feed import Feed
from broker_filter.watch.labels import BOGUS, MAX_NOTE, REAL, Label, LabelFileError, LabelTable
from broker_filter.watch.listing import LISTED, NEWEST, PER_PAGE, Query, QueryError, select
from broker_filter.watch.store import Alert, AlertStore

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_HEADER = "x-watch-token"  # noqa: S105 - the name of a header
COOKIE = "broker-filter-watch"
MAX_BODY_BYTES = 8 * 1024
MAX_STREAMS = 16
"""The most pages that get live counts at the same time."""
LOOK_S = 0.5
"""How often a live stream looks for something new."""
BEAT_S = 15.0
"""How often a live stream sends a comment, so that a connection that is gone is noticed."""
ASSETS = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "light_curve.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every answer."""


@dataclass(frozen=True, slots=True)
class Night:
    """What a page shows. `labels`: None if labels are not recorded. `title`: names the sources."""

    title: str
    store: AlertStore
    feed: Feed
    labels: LabelTable | None = None
    classes: Sequence[str] = ()
    chosen: Mapping[int, Chosen] = field(default_factory=dict)
    keep: int = 0


def make_app(night: Night, access: Access, stopping: Callable[[], bool] = lambda: False) -> Application:
    """Return the application. `stopping`: whether the server is about to end, so that live streams must end."""
    pages = _Pages(night, access.token, stopping)
    routes = [
        Route("/", pages.page),
        *(Route(f"/{name}", pages.asset) for name in ASSETS),
        Route("/api/night", pages.night),
        Route("/api/alerts", pages.alerts),
        Route("/api/alerts/{alert_id}", pages.alert),
        Route("/api/alerts/{alert_id}/{picture}.png", pages.picture),
        Route("/api/events", pages.events),
        Route("/api/labels", pages.label, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), access)


class Guard:
    """Refuses requests that do not come from the page itself, and adds HEADERS to each answer."""

    def __init__(self, app: Application, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._entering(scope) or self._refusal(scope, headers) or self._app
        await answer(scope, receive, send_with_headers)

    def _entering(self, scope: Scope) -> Response | None:
        """Return the answer to an address that holds the key: a cookie, and the address without the key."""
        key = self._access.key
        if key is None or scope["path"] != "/" or not scope["query_string"]:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        if not _same(given, key):
            return None
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(COOKIE, key, httponly=True, samesite="strict")
        return answer

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """Return why a request is refused; None if it is answered."""
        access, host = self._access, headers.get("host", "")
        if access.hosts is not None and host.lower() not in access.hosts:
            return PlainTextResponse("This name is not one of this server's.", 421)
        if access.key is not None and not _same(_cookie(headers.get("cookie", "")), access.key):
            return PlainTextResponse("Open the address that the command printed: it holds a key.", 403)
        navigates = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not navigates:
            return PlainTextResponse("Requests of other sites are refused.", 403)
        if scope["method"] in ("GET", "HEAD"):
            return None
        if headers.get("origin") != f"{scope['scheme']}://{host}":
            return PlainTextResponse("Requests of other sites are refused.", 403)
        if not _same(headers.get(TOKEN_HEADER, ""), access.token):
            return PlainTextResponse("The page is out of date: load it again.", 403)
        return None


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


class _Pages:
    """The answers to requests that the guard lets through."""

    def __init__(self, night: Night, token: str, stopping: Callable[[], bool]) -> None:
        self._night = night
        self._details = Details(night.store)
        self._stopping = stopping
        self._streams = 0
        folder = files("broker_filter.watch").joinpath("page")
        self._assets = {name: folder.joinpath(name).read_bytes() for name in ASSETS}
        page = folder.joinpath("page.html").read_text(encoding="utf-8")
        self._page = page.replace("{{title}}", escape(night.title)).replace("{{token}}", escape(token))

    def page(self, _: Request) -> Response:
        return Response(self._page, media_type="text/html; charset=utf-8", headers={"cache-control": "no-store"})

    def asset(self, request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        return Response(self._assets[name], media_type=ASSETS[name], headers={"cache-control": "no-cache"})

    def night(self, _: Request) -> Response:
        """Return what the page needs to know once: sources, classes, and the names of scores and filters."""
        night = self._night
        scores: dict[str, None] = {}
        passed: dict[str, None] = {}
        surveys: dict[str, None] = {}
        for alert in night.store.alerts():
            scores.update(dict.fromkeys(alert.facts.scores))
            passed.update(dict.fromkeys(alert.facts.passed))
            surveys[alert.facts.survey] = None
        return _json(
            {
                "title": night.title,
                "labels": night.labels is not None,
                "classes": [REAL, BOGUS, *night.classes],
                "listed": len(night.chosen),
                "sort": LISTED if night.chosen else NEWEST,
                "scores": sorted(scores)[:MAX_NAMES],
                "filters": sorted(passed)[:MAX_NAMES],
                "surveys": sorted(surveys),
                "max_note": MAX_NOTE,
                **self._counts(),
            }
        )

    def alerts(self, request: Request) -> Response:
        """Return a page of the list."""
        try:
            query = Query.parse(request.query_params)
        except QueryError as error:
            return JSONResponse({"error": str(error)}, 400)
        night = self._night
        newest = night.store.newest
        found = select(night.store.alerts(), query, night.labels, night.chosen)
        begin = query.page * PER_PAGE
        return _json(
            {
                "found": len(found),
                "page": query.page,
                "pages": -(-len(found) // PER_PAGE),
                "until": newest if query.until is None else query.until,
                "alerts": [self._row(alert) for alert in found[begin : begin + PER_PAGE]],
                **self._counts(),
            }
        )

    def alert(self, request: Request) -> Response:
        """Return everything about an alert."""
        alert_id = _alert_id(request.path_params["alert_id"])
        described = None if alert_id is None else self._details.describe(alert_id)
        if alert_id is None or described is None:
            return JSONResponse({"error": "The alert is not here: it may have been dropped."}, 404)
        entry = self._night.chosen.get(alert_id)
        neighbours = _neighbours(described["annotation"])
        return _json(
            {
                **described,
                **self._label(alert_id),
                "list": None if entry is None else {"place": entry.place + 1, "reason": entry.reason},
                "here": [one for one in neighbours if (near := _alert_id(one)) and self._night.store.get(near)],
            }
        )

    def picture(self, request: Request) -> Response:
        """Return a cutout, or the three of them side by side (`strip`), as a PNG."""
        alert_id, name = _alert_id(request.path_params["alert_id"]), request.path_params["picture"]
        png = None
        if alert_id is not None:
            png = self._details.strip(alert_id) if name == "strip" else self._details.picture(alert_id, name)
        if png is None:
            return PlainTextResponse("no such picture", 404)
        return Response(png, media_type="image/png", headers={"cache-control": "private, max-age=86400"})

    async def events(self, _: Request) -> Response:
        """Return the counts, and again whenever they change (server-sent events)."""
        if self._streams >= MAX_STREAMS:
            return PlainTextResponse("too many pages are open", 503)
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def _stream(self) -> AsyncIterator[str]:
        self._streams += 1
        try:
            sent, quiet_s = None, 0.0
            while not self._stopping():
                counts = self._counts()
                if counts != sent:
                    sent, quiet_s = counts, 0.0
                    yield f"data: {json.dumps(counts)}\n\n"
                elif quiet_s >= BEAT_S:
                    quiet_s = 0.0
                    yield ":\n\n"
                await asyncio.sleep(LOOK_S)
                quiet_s += LOOK_S
        finally:
            self._streams -= 1

    async def label(self, request: Request) -> Response:
        """Store the label of an alert."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return JSONResponse({"error": "a label is sent as JSON"}, 415)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                return JSONResponse({"error": "the request is too large"}, 413)
        return await run_in_threadpool(self._store_label, body)

    def _store_label(self, body: bytes) -> Response:
        night = self._night
        if night.labels is None:
            return JSONResponse({"error": "Labels are not recorded: start the command with --labels FILE."}, 409)
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        found = None
        if isinstance(given, dict) and isinstance(given.get("id"), str):
            alert_id = _alert_id(given["id"])
            found = None if alert_id is None else night.store.get(alert_id)
        if found is None:
            return JSONResponse({"error": "The alert is not here: it may have been dropped."}, 404)
        label, interesting, note = (given.get(name) for name in ("label", "interesting", "note"))
        if label not in ("", REAL, BOGUS, *night.classes):
            return JSONResponse({"error": "there is no such label"}, 400)
        if not isinstance(interesting, bool) or not isinstance(note, str) or len(note) > MAX_NOTE:
            return JSONResponse({"error": "the label is not complete"}, 400)
        facts = found[0].facts
        new = Label(facts.alert_id, facts.object_id, facts.survey, str(label), interesting, note, "")
        try:
            night.labels.set(new)
        except (OSError, LabelFileError) as error:
            return JSONResponse({"error": f"The label was not stored: {error}"}, 500)
        return _json({**self._label(facts.alert_id), **self._counts()})

    def _row(self, alert: Alert) -> dict[str, Any]:
        facts = alert.facts
        entry = self._night.chosen.get(facts.alert_id)
        return {
            "id": str(facts.alert_id),
            "number": alert.number,
            "object": facts.object_id,
            "survey": facts.survey,
            "mjd": facts.mjd,
            "band": facts.band,
            "magnitude": facts.magnitude,
            "anomaly": facts.anomaly,
            "flagged": facts.flagged,
            "passed": list(facts.passed),
            "reason": entry.reason if entry and entry.reason else facts.reason,
            "scores": dict(facts.scores),
            "pictures": facts.has_cutouts,
            **self._label(facts.alert_id),
        }

    def _label(self, alert_id: int) -> dict[str, Any]:
        label = self._night.labels.get(alert_id) if self._night.labels else None
        return {
            "label": label.label if label else "",
            "interesting": bool(label and label.interesting),
            "note": label.note if label else "",
        }

    def _counts(self) -> dict[str, Any]:
        night = self._night
        return {
            "kept": len(night.store),
            "newest": night.store.newest,
            "dropped": night.store.dropped,
            "keep": night.keep,
            "labelled": len(night.labels) if night.labels else 0,
            "reading": night.feed.is_reading,
            "packets": night.feed.packets,
            "unreadable": dict(night.feed.unreadable),
            "problem": night.feed.problem,
        }


MAX_NAMES = 200
"""The most scores, or filters, that a page offers for choosing: their names come from records."""


def _json(content: Mapping[str, Any]) -> Response:
    return JSONResponse(content, headers={"cache-control": "no-store"})


def _alert_id(text: str) -> int | None:
    """Return an alert id of a request; None if the text is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(2**63)) else None


def _neighbours(annotation: Mapping[str, Any]) -> list[str]:
    """Return the ids of the ordinary alerts that an annotation names as neighbours."""
    anomaly = annotation.get("anomaly")
    reason = anomaly.get("reason") if isinstance(anomaly, dict) else None
    near = reason.get("neighbours") if isinstance(reason, dict) else None
    found = near if isinstance(near, list) else []
    return [one["alert_id"] for one in found if isinstance(one, dict) and isinstance(one.get("alert_id"), str)]
