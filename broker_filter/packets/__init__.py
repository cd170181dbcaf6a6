"""Bytes to alerts: framing, schemas, decoding, stamps. Knows no model and no Kafka."""
