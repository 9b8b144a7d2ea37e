"""Captioned image sets: building them, reading them, checking them, and batches of them as training takes them."""
