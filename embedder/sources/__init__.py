"""Where images come from: listings of folders, manifests and URLs, and from a ref to its bytes."""
