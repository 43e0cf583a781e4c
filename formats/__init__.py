"""What files look like, for all stages: annotations, the dataset on disk, boxes, jigsaws, pixels.

No stage is imported here, so the files of one release can be read by the other stage alone.
"""
