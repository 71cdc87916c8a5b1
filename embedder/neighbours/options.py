"""How near is near."""

# Of EfficientNet-Lite0's features. Of 5,421 shop photographs 716 have a near-duplicate, in groups
# of up to 21; at 0.85 1,896, in groups of up to 112. Of 2,000 images
# of one textile 52, in groups of up to 9, and at 0.88 up to 92.
DEFAULT_THRESHOLD = 0.9
