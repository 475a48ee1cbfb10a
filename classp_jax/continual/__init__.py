"""Continual learning experiments: task streams, methods, metrics and reports."""
