"""From the bytes of a message or a file to encoded Avro records: containers, wire format, Parquet, other formats."""
