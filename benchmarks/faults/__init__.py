"""Faults under load, on real processes and a real Redis: what became of every request."""
