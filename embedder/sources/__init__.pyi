from .demo_images import images_folder as images_folder
from .listing import (
    MODIFIED_TYPE as MODIFIED_TYPE,
    RESERVED_COLUMNS as RESERVED_COLUMNS,
    Listing as Listing,
    list_images as list_images,
    read_bytes as read_bytes,
)
