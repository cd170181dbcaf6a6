"""From embeddings to anomaly scores: reference sets of ordinary alerts, distances from them, and thresholds.

It sees embeddings and names only: no packets, no Kafka.
"""
