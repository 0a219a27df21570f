"""From labelled pictures to nets, and from nets to the scores that a plan is made of: training and calibration.

How a net learns is in ``models/``; here is where its pictures come from and where it runs. May import ``steps``,
``labels``, ``flow``, ``run``, ``planning``.
"""
