"""From scored batches to the rows of a table: columns, file formats, and policies over the alerts of an object.

It knows no Kafka. The service does not use it.
"""
