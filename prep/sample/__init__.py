"""The sample dataset, which the project draws itself."""
