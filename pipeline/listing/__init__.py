"""Which objects there are to scan, and in which window of which shard each stands: from a source to a frozen manifest.

A listing streams to disk and is never held in memory. May import no other package.
"""
