"""The seven built-in stages: one file each, a Config on top and `run` below."""
