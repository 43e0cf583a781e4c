"""Source images: where they lie, how they are decoded, what their pixels are."""
