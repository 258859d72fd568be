"""Heavy: what a checkpoint becomes for those who run it."""
