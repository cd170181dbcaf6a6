"""From packets to output records: reads archives, scores, filters, flags anomalies and encodes alerts.

It does not use Kafka.
"""
