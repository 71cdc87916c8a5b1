from .byte_budget import ByteBudget as ByteBudget, Claim as Claim
from .demo_images import images_folder as images_folder
from .listing import Listing as Listing, list_images as list_images
from .reading import read_bytes as read_bytes, sha256_of as sha256_of
from .refs import MODIFIED_TYPE as MODIFIED_TYPE, are_urls as are_urls
from .urls import is_local as is_local, scheme_of as scheme_of
