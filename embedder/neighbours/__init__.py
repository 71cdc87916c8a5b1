"""Which vectors are near each other."""
