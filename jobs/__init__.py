"""Command line entry points. A job parses, builds, runs and reports; the work is done elsewhere."""
