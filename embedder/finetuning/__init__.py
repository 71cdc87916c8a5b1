"""The second pass: a backbone and its head trained further."""
