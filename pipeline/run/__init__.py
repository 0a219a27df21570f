"""One scan from its configuration to its record: preflight, freeze, drive, report. On the Ray of this machine, or
submitted to the head of a cluster and followed from here.

May import ``listing``, ``output``, ``past``, ``steps``, ``reporting``, ``labels``, ``flow``.
"""
