from .index import NeighbourIndex as NeighbourIndex
from .near_duplicates import (
    DEFAULT_THRESHOLD as DEFAULT_THRESHOLD,
    near_duplicate_groups as near_duplicate_groups,
)
