"""What a dataset's images are: their pixel format, and statistics of their pixels."""
