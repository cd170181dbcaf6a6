"""Kafka: the consumer, the transactions of the output, stored positions, and the checks before a start.

All modules that talk to a broker are here. The modules of `streaming` do not use Kafka.
"""
