"""Measurements against the peers. Not installed; run from the repository."""
