"""Kafka: the consumer, the transactions of the output, stored positions, and the checks before a start.

Every module that talks to a broker is here. The modules of `streaming` know no Kafka.
"""
