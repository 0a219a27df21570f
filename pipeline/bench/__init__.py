"""What is how fast, and what it costs: measured beside rivals or a limit, or on paper.

No other package imports it. May import ``listing``, ``output``, ``steps``, ``labels``, ``flow``, ``run``, ``planning``,
``training``.
"""
