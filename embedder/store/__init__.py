"""The feature store: shards of Parquet, and what keeps them whole."""
