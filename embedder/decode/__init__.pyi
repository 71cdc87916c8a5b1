from .decode import (
    FORMATS as FORMATS,
    DecodedImage as DecodedImage,
    decode_rgb as decode_rgb,
    prepare_decoders as prepare_decoders,
)
