"""Pre-train a detector's backbone from the detection dataset itself (Jigsaw pre-training)."""
