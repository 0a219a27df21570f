"""Scans as others would write them, for ``jobs.benchmark scan``: scripts of their own, no part of the pipeline."""
