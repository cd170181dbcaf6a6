"""The program of docs/how-to/notify.md posts the alerts of a filter's topic, with a picture, to a webhook."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Literal

import matplotlib.image
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from broker_filter.config import Runtime
from broker_filter.packets.packet import Packet
from broker_filter.scoring.scorer import open_scorer
from broker_filter.simulate import SCHEMAS, simulate_night
from broker_filter.streaming.duplicates import DuplicateWindow
from broker_filter.streaming.encoding import ContainerFraming, Encoder
from broker_filter.streaming.filtering import score_packets
from broker_filter.streaming.routing import Router

GUIDE = Path(__file__).parents[1] / "docs" / "how-to" / "notify.md"
SURVEYS: tuple[Literal["ztf"], Literal["lsst"]] = ("ztf", "lsst")
PATIENCE_S = 60
MOST_LINES = 6


def program() -> str:
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found
    return found.group(1)


def test_program_posts_each_alert_once_with_a_picture_of_the_first(
    kafka_bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    pytest.importorskip("requests", reason="requests comes with the extra `test`")
    prefix = unique_name("me")
    topic = f"{prefix}.scored"
    scorer = open_scorer(["default"], Runtime())
    packets = [Packet(one.packet) for survey in SURVEYS for one in simulate_night(4, seed=1, survey=survey)]
    scored = score_packets(packets, scorer.decoder(SCHEMAS), scorer, DuplicateWindow(100))
    router = Router(prefix, models=[], encoder=Encoder("full"), framing=ContainerFraming())
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    for record in router.route(scored).records:
        producer.produce(record.topic, record.value, record.key)
    assert producer.flush(PATIENCE_S) == 0

    posts: Queue[Message] = Queue()

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            posts.put(message_from_bytes(head + self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    text = program().replace("ours:9092", kafka_bootstrap).replace("me.fast", topic)
    text = text.replace('"notify"', f'"{prefix}"').replace('"latest"', '"earliest"')
    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"WEBHOOK": f"http://127.0.0.1:{server.server_port}/hook", "MPLBACKEND": "agg"}
        running = subprocess.Popen([sys.executable, "-c", text], env=environment)
        try:
            post = posts.get(timeout=PATIENCE_S)
        finally:
            running.kill()
            running.wait()
            server.shutdown()
    content, picture = (part.get_payload(decode=True) for part in post.walk() if not part.is_multipart())
    assert isinstance(content, bytes)
    assert isinstance(picture, bytes)
    document = json.loads(content)
    assert document["allowed_mentions"] == {"parse": []}
    first, *lines = document["content"].splitlines()
    alerts = len(scored.scored)
    assert alerts == len(packets)
    assert first == f"{alerts} alerts in {topic}"
    names = [line.partition(":")[0] for line in lines]
    assert set(names) <= set(scored.alerts.object_id)
    assert 0 < len(names) < MOST_LINES
    pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")
    assert pixels.std() > 0.1  # stamps, and not an empty page
