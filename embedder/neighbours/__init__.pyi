from .index import NeighbourIndex as NeighbourIndex
from .near_duplicates import near_duplicate_groups as near_duplicate_groups
from .options import DEFAULT_THRESHOLD as DEFAULT_THRESHOLD
