from .decode import (
    FORMATS as FORMATS,
    MAX_ORDINARY_PIXELS as MAX_ORDINARY_PIXELS,
    MAX_PIXELS as MAX_PIXELS,
    DecodedImage as DecodedImage,
    LargeImage as LargeImage,
    decode_rgb as decode_rgb,
    prepare_decoders as prepare_decoders,
)
