"""The commands of the prep stage: options, and one call each."""
