"""What people say of what a run found: the review page and its decisions, and what follows from them about recall.

Scan output is read and never changed; decisions are a table of their own. May import ``listing``, ``output``, ``past``,
``steps``, ``reporting``.
"""
