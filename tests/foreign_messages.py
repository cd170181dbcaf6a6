"""Messages that confluent-kafka cannot send; they are sent through the C interface of its librdkafka."""

from __future__ import annotations

import ctypes
from pathlib import Path

import confluent_kafka

PRODUCER = 0
END, TOPIC, VALUE, FLAGS, HEADER = 0, 1, 4, 7, 9
"""Values of `rd_kafka_type_t` and `rd_kafka_vtype_t` in rdkafka.h."""
MESSAGE_SIZE, COPY = 512, 2
TIMEOUT_MS = 30_000


def librdkafka() -> ctypes.CDLL:
    """Return the library with which confluent-kafka is linked."""
    package = Path(confluent_kafka.__file__).parent
    (library,) = (package.parent / "confluent_kafka.libs").glob("librdkafka*.so*")
    return ctypes.CDLL(str(library))


def send_with_header(bootstrap: str, topic: str, value: bytes, key: bytes) -> None:
    """Send a message with one header, whose key may contain any bytes except zeros."""
    library = librdkafka()
    library.rd_kafka_conf_new.restype = library.rd_kafka_new.restype = ctypes.c_void_p
    reason = ctypes.create_string_buffer(MESSAGE_SIZE)
    configuration = ctypes.c_void_p(library.rd_kafka_conf_new())
    name = b"bootstrap.servers"
    assert library.rd_kafka_conf_set(configuration, name, bootstrap.encode(), reason, MESSAGE_SIZE) == 0, reason.value
    producer = ctypes.c_void_p(library.rd_kafka_new(PRODUCER, configuration, reason, MESSAGE_SIZE))
    assert producer, reason.value
    arguments = [
        (ctypes.c_int(TOPIC), ctypes.c_char_p(topic.encode())),
        (ctypes.c_int(VALUE), ctypes.c_char_p(value), ctypes.c_size_t(len(value))),
        (ctypes.c_int(HEADER), ctypes.c_char_p(key), ctypes.c_char_p(b"x"), ctypes.c_ssize_t(1)),
        (ctypes.c_int(FLAGS), ctypes.c_int(COPY)),
        (ctypes.c_int(END),),
    ]
    assert library.rd_kafka_producev(producer, *(one for group in arguments for one in group)) == 0
    assert library.rd_kafka_flush(producer, TIMEOUT_MS) == 0
    library.rd_kafka_destroy(producer)
