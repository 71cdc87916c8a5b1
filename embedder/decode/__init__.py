"""From bytes to pixels: decoding, cropping, resizing, augmented views."""
