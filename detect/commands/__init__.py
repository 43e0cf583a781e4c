"""The commands of the detection stage: options, and one call each."""
