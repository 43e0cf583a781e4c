"""Detectors, and the backbones and weights that they start from."""
