from .batch_size import (
    find_batch_size as find_batch_size,
    images_per_second as images_per_second,
    is_batch_size_known as is_batch_size_known,
)
from .engine import (
    ENGINES as ENGINES,
    Engine as Engine,
    Features as Features,
    check_precision as check_precision,
    choose as choose,
    gpus_of as gpus_of,
)
from .loading import load as load, prepare as prepare
from .tensorflow import best_training_precision as best_training_precision
