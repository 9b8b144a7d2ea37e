"""Continuous batching: what runs next, and the loop that runs it."""
