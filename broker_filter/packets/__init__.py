"""Alert packets to columns: framing, schemas, decoding and FITS stamps. Must never depend on a model or on Kafka."""
