"""Confluent wire format has a zero byte, a big-endian schema id and the body."""

from __future__ import annotations

from broker_filter.packets.framing import wire


def test_the_id_is_big_endian() -> None:
    assert wire.frame(704, b"body") == b"\x00\x00\x00\x02\xc0body"
    assert wire.unframe(b"\x00\x00\x00\x02\xc0body") == (704, b"body")


def test_ids_of_real_packets_encode_the_schema_version(lsst_packets: list[tuple[str, bytes]]) -> None:
    ids = {wire.unframe(data).schema_id for _, data in lsst_packets if wire.is_wire_message(data)}
    assert {700, 701, 703, 704, 800, 1000} <= ids


def test_the_body_is_a_zero_copy_view() -> None:
    data = wire.frame(1, bytes(100))
    assert wire.unframe(data).body.obj is data


def test_other_bytes_are_not_wire_messages() -> None:
    for data in (b"", b"\x00", b"\x00\x00\x00\x02\xc0", b"Obj\x01 and more", b"\x01\x00\x00\x02\xc0body"):
        assert not wire.is_wire_message(data)
