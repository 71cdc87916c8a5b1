from .engine import (
    ENGINES as ENGINES,
    Engine as Engine,
    Features as Features,
    best_training_precision as best_training_precision,
    check_precision as check_precision,
    choose as choose,
    find_batch_size as find_batch_size,
    gpus_of as gpus_of,
    is_batch_size_known as is_batch_size_known,
    load as load,
    prepare as prepare,
)
