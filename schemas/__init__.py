"""The Avro schemas that the service writes; installed as `broker_filter.schemas`."""
