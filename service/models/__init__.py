"""The bundles of a service: which there are, which are open, and what opens and closes them."""
