"""What a run tells: events, progress, heartbeats and metrics while it goes on, and who is at work on which window; the
report with its histograms, trends, prices and other thresholds afterwards.

Nothing here decides about an image or writes a table. May import ``listing``, ``output``, ``past``, ``steps``.
"""
