"""What several models, or a store's vectors, say side by side."""
