"""The HTTP service: requests in, images out. Knows the pipeline by its interface, and nothing of training."""
