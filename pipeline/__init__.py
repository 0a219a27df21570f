"""The scan: manifest, windows, fetch, decode, stages, sink, commit.

Beside this file lies what every package knows: ``window`` and ``schema`` (what travels, and what is written), ``codes``
and ``errors`` (what can go wrong), ``plan`` and ``documents`` (what people configure), ``storage`` and ``store`` (where
bytes live). ``flow`` strings the steps together as Ray Data sees them. CONTRIBUTING.md says which package holds what;
``tests/test_layers.py`` has the order in which they may import each other.
"""
