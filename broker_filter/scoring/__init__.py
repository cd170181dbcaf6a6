"""Model bundles, preprocessing, runtimes and the scorer: AlertBatch -> Scores. Knows no Kafka, and reads no files but
bundles and references."""
