"""What becomes of the tables of complete runs: they are queried, compacted, published to a catalogue, rid of what dead
drivers left behind, and of objects that have to go.

Only ``compact`` and ``erase`` change what a complete run has written. May import ``listing``, ``output``, ``past``,
``reporting``, ``review``.
"""
