"""The dataset on disk, the contract between prep and train: shards, manifests, dataset.json."""
