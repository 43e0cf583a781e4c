"""Pages, figures, snapshots and sheets of jigsaws of a run."""
