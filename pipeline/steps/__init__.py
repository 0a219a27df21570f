"""What a window passes through: fetch, decode, hash matches, the stages with their group tests.

A step is a callable from windows to windows, or from rows to rows; nothing here imports Ray. ``rows`` has the adapters
with which actors hold the steps. The last step, the sink, is in ``output``, with whose files it deals. May import
``listing``, ``past``.
"""
