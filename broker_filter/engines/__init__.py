"""The scorer inside engines that hold alerts in tables. Each engine's module needs the engine's own packages.

Nothing here decodes or scores: `broker_filter.ArrowScorer` does, and a module only hands an engine's rows to it.
"""
