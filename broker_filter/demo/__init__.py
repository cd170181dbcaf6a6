"""The main job on one machine, from nothing: a simulated night through a broker and the service, and what came of it.

Everything that a user of the service would see is real: a broker, a configuration file, `broker-filter run` as a
process of its own, a plain client of the output topics. Needs the extra `demo`; no network, no Kafka.
"""
