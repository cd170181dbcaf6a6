"""Runs of whole processes, most of them through a broker: the service, and the loops that it is compared with."""
