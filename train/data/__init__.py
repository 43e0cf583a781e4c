"""From shards to batches of jigsaws: lanes, readers, augmentation, workers."""
