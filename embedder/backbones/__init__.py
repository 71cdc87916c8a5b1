"""The networks: their table, their weights, and from a recipe to a Keras model."""
