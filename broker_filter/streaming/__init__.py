"""From packets to output records and tables: reads archives, scores, filters and encodes alerts.

It does not use Kafka.
"""
