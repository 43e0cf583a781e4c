"""Stage 2, on GPUs and streaming: shards -> lanes -> jigsaws -> ERF-adaptive loss -> backbone."""
