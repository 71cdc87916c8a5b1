"""Training heads on cached features."""
