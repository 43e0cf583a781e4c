"""The training loop: steps, state, checkpoints, ranks, metrics, the run folder."""
