"""From packets to output records and tables: archives are read, alerts scored, filtered and encoded. Knows no Kafka."""
