"""Labels and splits: what there is to learn, and to be tested on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
