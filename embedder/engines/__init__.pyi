from .batch_size import (
    find_batch_size as find_batch_size,
    images_per_second as images_per_second,
    remembered_batch_size as remembered_batch_size,
)
from .engine import (
    ENGINES as ENGINES,
    Engine as Engine,
    Features as Features,
    Runtime as Runtime,
    check_precision as check_precision,
    choose as choose,
)
from .loading import load as load, prepare as prepare
from .tensorflow import best_training_precision as best_training_precision
