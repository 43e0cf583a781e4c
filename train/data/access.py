"""How a run reaches its shards: cache, retries, what to do about a bad shard. None of it changes a batch.

A dataset in a folder of this machine is mapped where it lies, and only ``on_bad_shard`` matters. One at a URL is read
through the host's cache (cache.py), or with ``--no-cache`` through temporary files of each process, which is for
machines that see every shard once.
"""
