"""Feature-embedding batch extraction: images in, a feature store out."""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "api": [
            "compare",
            "evaluate",
            "export",
            "extract",
            "finetune",
            "list_backbones",
            "load_model",
            "open_store",
            "predict",
            "train",
            "verify",
        ],
        "errors": ["EmbedderError"],
        "store": ["Store"],
    },
)
