from .batch_size import (
    find_batch_size as find_batch_size,
    images_per_second as images_per_second,
    remembered_batch_size as remembered_batch_size,
)
from .choice import (
    available_engines as available_engines,
    choose as choose,
    supports as supports,
    why_not as why_not,
)
from .engine import (
    ENGINES as ENGINES,
    Engine as Engine,
    Features as Features,
    Runtime as Runtime,
    check_precision as check_precision,
)
from .jax import forget_prepared as forget_prepared, import_jax as import_jax
from .loading import (
    fastest as fastest,
    load as load,
    prepare as prepare,
    ready_keras as ready_keras,
)
from .own_process import (
    call_apart as call_apart,
    claim_process as claim_process,
    runs_here as runs_here,
)
