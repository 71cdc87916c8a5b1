"""Labels and splits: what there is to learn, and to be tested on."""
