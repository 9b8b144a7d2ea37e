"""Students as graphs, and runs as bundles."""
