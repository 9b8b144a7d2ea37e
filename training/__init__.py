"""Offline: training, distillation, evaluation, export. Imports engines; nothing imports it."""

import engines as engines  # before all that imports ONNX Runtime
