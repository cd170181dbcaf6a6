"""Runs the service on one machine: sends simulated nights through a broker and the service.

Everything except the sky is real: a broker, a configuration file, `broker-filter run` in its own process, and an
independent client of the output topics. Needs the extra `demo`, but no network and no Kafka installation.
"""
