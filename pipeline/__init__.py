"""The scan: manifest, windows, fetch, decode, stages, sink, commit."""
