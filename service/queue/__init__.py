"""Where jobs wait between the request that made them and the worker that runs them."""
