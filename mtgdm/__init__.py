"""Distil a strong teacher model into a small local student."""

__version__ = "0.1.0"
