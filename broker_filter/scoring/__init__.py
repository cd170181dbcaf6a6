"""Model bundles, the one preprocessing, runtimes: AlertBatch -> Scores. Knows no Kafka and no files but bundles."""
