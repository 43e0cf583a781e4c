"""Backbones, their feature maps, and the dense classifier on top."""
