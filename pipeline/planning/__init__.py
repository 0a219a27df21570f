"""From the scores of a calibration to a plan: routes, thresholds, what they are certified to find, a page that says so.

Arithmetic on tables: no picture is opened, no net is run. May import ``steps``.
"""
