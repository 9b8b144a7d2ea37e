"""Captioned image sets: building them, reading them, checking them. Knows nothing of models."""
