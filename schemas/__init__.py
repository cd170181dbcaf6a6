"""The Avro schemas of the records that the service writes; installed as `broker_filter.schemas`."""
