"""`broker-filter bench`: how fast the service is, compared with a naive loop and with lower bounds.

All three are measured in one run on the same packets. Machines differ, so only ratios are compared between runs. The
service uses nothing from this package.
"""
