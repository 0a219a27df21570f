"""From windows with verdicts to the tables and the record of a run: attempt files, reconciliation, commit.

``sink`` runs in actors and writes attempts; ``commit`` runs in the driver, and knows under which names everything lies.
Nothing here knows Ray or nets. May import ``listing``.
"""
