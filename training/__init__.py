"""Offline: training, distillation, evaluation, export. Imports engines; nothing imports it."""
