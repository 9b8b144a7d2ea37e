"""What runs a student: bundles, engines, pipeline. Knows arrays and graphs, nothing of HTTP or training."""
