"""Reads images: from a folder, a store or an archive; bytes to pixels."""
