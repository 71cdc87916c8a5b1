"""Checks of stores, engines and machines."""
