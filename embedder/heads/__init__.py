"""Classifiers on features, and the model that one of them and a recipe make."""
