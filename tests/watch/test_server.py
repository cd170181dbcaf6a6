"""The page's data, labels and live counts; and the requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `watch`")
pytest.importorskip("httpx2", reason="the requests need httpx2")

from starlette.testclient import TestClient

from broker_filter.watch.access import Access, ListenError, access_to, listen
from broker_filter.watch.chosen import Chosen
from broker_filter.watch.labels import LabelTable
from broker_filter.watch.links import links
from broker_filter.watch.listing import Query, QueryError
from broker_filter.watch.server import HEADERS, MAX_STREAMS, TOKEN_HEADER, Night, make_app

from .conftest import Fill
from .made_night import FIRST_ID, HOSTILE, annotation, records

ORIGIN = "http://127.0.0.1:8010"
N = 120
Open = Callable[..., TestClient]


@pytest.fixture
def open_night(fill: Fill, tmp_path: Path) -> Open:
    """Return a function that serves `n` records, with a table of labels, and returns a client."""

    def serve(n: int = 8, *, access: Access | None = None, text: str = "", **options: Any) -> TestClient:
        store, feed = fill(list(records(n, distinct=2, text=text)))
        labels = options.pop("labels", LabelTable(tmp_path / "labels.csv"))
        night = Night("a <night>", store, feed, labels, ("SN", "AGN"), keep=1000, **options)
        app = make_app(night, access or Access({"127.0.0.1:8010"}, token="token"))
        return TestClient(app, base_url=ORIGIN)

    return serve


def ids(answer: Any) -> list[int]:
    return [int(row["id"]) - FIRST_ID for row in answer.json()["alerts"]]


def label_of(client: TestClient, k: int, label: str, **changed: Any) -> Any:
    headers = {"origin": ORIGIN, TOKEN_HEADER: "token", **changed.pop("headers", {})}
    body = {"id": str(FIRST_ID + k), "label": label, "interesting": False, "note": "", **changed}
    return client.post("/api/labels", json=body, headers=headers)


def test_the_list_is_paged_sorted_and_filtered(open_night: Open) -> None:
    client = open_night(N)
    whole = client.get("/api/alerts").json()
    assert (whole["found"], whole["pages"], len(whole["alerts"])) == (N, 3, 50)
    pages = [ids(client.get("/api/alerts", params={"page": page})) for page in range(3)]
    assert sorted(k for page in pages for k in page) == list(range(N))
    score = {k: annotation(k)["anomaly"]["score"] for k in range(N)}
    strangest = ids(client.get("/api/alerts", params={"sort": "strangest"}))
    assert [score[k] for k in strangest] == sorted(score.values(), reverse=True)[:50]
    assert ids(client.get("/api/alerts", params={"sort": "arrival"}))[:3] == [119, 118, 117]
    real = {k: k * 13 % 100 / 100 for k in range(N)}
    lowest = ids(client.get("/api/alerts", params={"sort": "-default.real", "low": "0.495", "score": "default.real"}))
    assert [real[k] for k in lowest] == sorted(value for value in real.values() if value >= 0.495)[:50]
    assert set(ids(client.get("/api/alerts", params={"passed": "young-supernova"}))) == set(range(0, N, 5))
    assert set(ids(client.get("/api/alerts", params={"survey": "lsst", "sort": "arrival"}))) == set(range(21, N, 2))
    assert ids(client.get("/api/alerts", params={"text": str(FIRST_ID + 7)})) == [7]
    assert set(ids(client.get("/api/alerts", params={"text": "LIGHT_curve"}))) == set(range(0, N, 7))


def test_alerts_that_arrive_later_are_counted_and_not_in_the_list(open_night: Open, fill: Fill) -> None:
    client = open_night(8)
    answer = client.get("/api/alerts", params={"until": 5}).json()
    assert (answer["found"], answer["newest"], answer["until"]) == (5, 8, 5)


def test_the_order_of_a_list_is_kept(open_night: Open) -> None:
    chosen = {FIRST_ID + 5: Chosen(0, "uncertain"), FIRST_ID + 2: Chosen(1, "odd")}
    client = open_night(8, chosen=chosen)
    assert client.get("/api/night").json()["sort"] == "listed"
    answer = client.get("/api/alerts", params={"sort": "listed"})
    assert ids(answer)[:2] == [5, 2]
    assert answer.json()["alerts"][0]["reason"] == "uncertain"
    assert client.get(f"/api/alerts/{FIRST_ID + 2}").json()["list"] == {"place": 2, "reason": "odd"}


def test_an_alert_is_described_with_pictures(open_night: Open) -> None:
    client = open_night(8)
    for k in (0, 1):
        one = client.get(f"/api/alerts/{FIRST_ID + k}").json()
        assert one["id"] == str(FIRST_ID + k)  # as text: JavaScript would round it
        assert one["cutouts"] == ["science", "template", "difference"]
        assert [point["kind"] for point in one["light_curve"]].count("detection") >= 1
        assert one["annotation"]["filters"][0]["name"] == "young-supernova"
        for picture in ("science", "template", "difference", "strip"):
            answer = client.get(f"/api/alerts/{FIRST_ID + k}/{picture}.png")
            assert answer.headers["content-type"] == "image/png"
            assert answer.content.startswith(b"\x89PNG")
    one = client.get(f"/api/alerts/{FIRST_ID}").json()
    assert one["here"] == [str(FIRST_ID + 1)]
    assert one["annotation"]["anomaly"]["reason"]["neighbours"][0]["alert_id"] == str(FIRST_ID + 1)


@pytest.mark.parametrize(
    "path",
    ["/api/alerts/9", "/api/alerts/x", f"/api/alerts/{'9' * 5000}", "/api/alerts/٣", f"/api/alerts/{FIRST_ID}/etc.png",
     "/api/alerts/..%2f..%2fetc%2fpasswd", "/..%2fpage.html", "/page/page.js", "/server.py"],
)  # fmt: skip
def test_what_does_not_exist_is_not_found(open_night: Open, path: str) -> None:
    assert open_night(2).get(path).status_code == 404


@pytest.mark.parametrize(
    "parameters",
    [{"page": "-1"}, {"page": "x"}, {"low": "nan"}, {"text": "x" * 300}, {"path": "/"}, {"until": "٣"}],
)
def test_invalid_queries_are_refused(open_night: Open, parameters: dict[str, str]) -> None:
    with pytest.raises(QueryError):
        Query.parse(parameters)
    assert open_night(2).get("/api/alerts", params=parameters).status_code == 400


def test_labels_are_stored_and_select_alerts(open_night: Open, tmp_path: Path) -> None:
    client = open_night(8)
    assert label_of(client, 3, "SN", interesting=True, note="rising").json()["labelled"] == 1
    assert label_of(client, 4, "bogus").status_code == 200
    assert ids(client.get("/api/alerts", params={"label": "SN"})) == [3]
    assert ids(client.get("/api/alerts", params={"label": "interesting"})) == [3]
    assert set(ids(client.get("/api/alerts", params={"label": "any"}))) == {3, 4}
    assert set(ids(client.get("/api/alerts", params={"label": "none"}))) == {0, 1, 2, 5, 6, 7}
    assert ids(client.get("/api/alerts", params={"text": "rising"})) == [3]
    assert f"{FIRST_ID + 3}" in (tmp_path / "labels.csv").read_text()
    assert label_of(client, 3, "").json()["label"] == ""


def test_labels_that_are_not_complete_are_refused(open_night: Open) -> None:
    client = open_night(2)
    assert label_of(client, 0, "galaxy").status_code == 400
    assert label_of(client, 0, "real", interesting="yes").status_code == 400
    assert label_of(client, 0, "real", note="x" * 1000).status_code == 400
    assert label_of(client, 0, "real", note="x" * 10_000).status_code == 413
    assert label_of(client, 7, "real").status_code == 404
    assert label_of(client, 0, "real", id=3).status_code == 404
    headers = {"origin": ORIGIN, TOKEN_HEADER: "token", "content-type": "application/json"}
    assert client.post("/api/labels", content=b"[" * 5000, headers=headers).status_code == 404
    assert (
        client.post("/api/labels", data={"id": "1"}, headers=headers | {"content-type": "text/plain"}).status_code
        == 415
    )
    assert label_of(open_night(2, labels=None), 0, "real").status_code == 409


def test_requests_of_other_sites_are_refused(open_night: Open) -> None:
    client = open_night(2)
    assert client.get("/", headers={"host": "evil.example:8010"}).status_code == 421
    assert client.get("/", headers={"host": "127.0.0.1"}).status_code == 421
    assert client.get("/api/alerts", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200
    for headers in (
        {TOKEN_HEADER: "wrong"},
        {TOKEN_HEADER: ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "same-site"},
    ):
        assert label_of(client, 0, "real", headers=headers).status_code == 403
    assert client.get("/api/night").json()["labelled"] == 0


def test_every_answer_has_the_security_headers(open_night: Open) -> None:
    client = open_night(2)
    for path, host in (
        ("/", "127.0.0.1:8010"),
        ("/page.js", "127.0.0.1:8010"),
        ("/none", "127.0.0.1:8010"),
        ("/", "x"),
    ):
        answer = client.get(path, headers={"host": host})
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    page = client.get("/").text
    assert "<title>a &lt;night&gt; - broker-filter watch</title>" in page
    assert "<script>" not in page
    assert "style=" not in page


def test_text_of_packets_is_only_in_json(open_night: Open) -> None:
    client = open_night(2, text=HOSTILE)
    answer = client.get(f"/api/alerts/{FIRST_ID}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["object"] == HOSTILE
    assert {link["name"] for link in answer.json()["links"]} == {"SIMBAD", "TNS", "Legacy Survey"}
    assert HOSTILE not in client.get("/").text


def test_elsewhere_than_on_loopback_a_key_is_needed(open_night: Open) -> None:
    access, address = access_to("0.0.0.0", 8010)
    client = open_night(2, access=access)
    key = address.partition("?key=")[2]
    assert len(key) > 30
    assert client.get("/api/night").status_code == 403
    assert client.get("/", params={"key": "wrong"}).status_code == 403
    assert client.get("/", params={"key": key}, follow_redirects=False).headers["location"] == "/"
    assert client.get("/api/night").status_code == 200
    assert access_to("10.0.0.1", 1)[0].hosts == {"10.0.0.1:1"}
    for loopback, named in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost")):
        access, address = access_to(loopback, 8010)
        assert access.key is None
        assert address == f"http://{named}:8010/"
        assert access.hosts == {f"{named}:8010", "localhost:8010"}


def test_counts_are_live(open_night: Open, fill: Fill) -> None:
    store, feed = fill(list(records(3, distinct=2)))
    ends = iter([False, True])
    app = make_app(Night("n", store, feed), Access({"127.0.0.1:8010"}), lambda: next(ends, True))
    client = TestClient(app, base_url=ORIGIN)
    text = client.get("/api/events").text
    assert text.startswith("data: ")
    counts = json.loads(text.partition("data: ")[2].partition("\n\n")[0])
    assert (counts["kept"], counts["newest"], counts["reading"]) == (3, 3, False)
    assert MAX_STREAMS > 1


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(ListenError, match="choose another --host or --port"):
        listen("127.0.0.1", listener.getsockname()[1])


def test_links_are_made_of_names_of_the_survey_only() -> None:
    ztf = dict(links("ztf", "ZTF18abcdefg", 10.5, -5.25))
    assert ztf["ALeRCE"] == "https://alerce.online/object/ZTF18abcdefg"
    assert ztf["TNS"] == "https://www.wis-tns.org/search?ra=10.500000&decl=-5.250000&radius=5&coords_unit=arcsec"
    assert "Coord=10.500000%20-5.250000&" in ztf["SIMBAD"]
    assert dict(links("lsst", "170635519425249637", 1, 2))["Fink"] == "https://lsst.fink-portal.org/170635519425249637"
    for survey, name in (("ztf", "javascript:alert(1)"), ("lsst", "1/../2"), ("ztf", "ZTF18abcdefg\n"), ("x", "1")):
        assert all(address.startswith("https://") for _, address in links(survey, name, 1, 2))
        assert len(links(survey, name, 1, 2)) == 3
