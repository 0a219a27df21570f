"""What earlier runs tell this one: which objects and contents are judged already, which failed and may be tried again,
and whether tonight looks like the nights before.

``records`` reads each record once, whoever wants it. May import ``listing``, ``output``.
"""
