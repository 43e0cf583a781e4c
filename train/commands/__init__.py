"""The commands of the training stage: options, and one call each."""
