"""The plan: every crop, decided from the annotations and the seed alone."""
