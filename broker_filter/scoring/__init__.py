"""Model bundles, preprocessing, runtimes and the scorer: AlertBatch -> Scores.

The package does not use Kafka. It reads no files except bundles and references.
"""
