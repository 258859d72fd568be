"""The student side: models, chat template, packing, training, generation."""
