"""From packets to published alerts: sources, the one path through decoding and scoring, routing, sinks."""
