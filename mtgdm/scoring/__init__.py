"""How well a text does: likeness to a reference, and what a mean over rows can and cannot say."""
