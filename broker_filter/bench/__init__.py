"""`broker-filter bench`: how fast the service is, beside a naive loop and the floors, in one run on the same packets.

Machines differ, so what is compared between runs is ratios. Nothing here is used by the service.
"""
