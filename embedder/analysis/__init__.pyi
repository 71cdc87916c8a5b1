from .compare import compare as compare, row_of as row_of
from .layout import map_coordinates as map_coordinates
