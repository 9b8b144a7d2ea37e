"""The endpoints. A route reads a request, calls what does the work, and writes the answer."""
