"""What prep and train agree on: aspect groups, keyed draws, names, manifests, storage, errors.

Neither stage is imported here, so the files of one release can be read by the other stage alone.
"""
