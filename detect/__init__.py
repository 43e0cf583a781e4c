"""Stage 3: backbone -> detector -> AP: does the pre-training pay?

Imports ``train`` for backbones and checkpoints, ``formats`` for what all stages share, and never ``prep``.
"""
