"""Comparisons: arms, trained over seeds, tabulated and drawn."""
