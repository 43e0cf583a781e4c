"""What a run shows: its page, figures, snapshots and sheets of jigsaws."""
