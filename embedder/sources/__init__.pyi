from .demo_images import images_folder as images_folder
from .listing import (
    MODIFIED_TYPE as MODIFIED_TYPE,
    Listing as Listing,
    list_images as list_images,
    read_bytes as read_bytes,
)
