"""What runs a student: bundles, engines, pipeline. Knows arrays and graphs, nothing of HTTP or training."""

from os import environ

# ONNX Runtime's official builds report to their maker; who wants that can set it to 0. It is read when they load.
environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
