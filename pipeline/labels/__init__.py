"""Pictures of which is known what they show: those that people have labelled or reviewed, and those that we draw.

Training, calibration, benchmarks and the demo work on them, and a scan of them is judged by them. May import
``listing``, ``steps``, ``review``.
"""
