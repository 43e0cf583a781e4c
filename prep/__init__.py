"""Stage 1, on CPUs and once: annotations -> plan -> crops -> parts -> shards and manifests."""
