"""Where images come from: listings of folders, manifests and URLs, and from a ref to its bytes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
