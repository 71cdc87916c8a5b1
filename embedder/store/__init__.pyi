from .lease import lease as lease
from .scan import (
    scan as scan,
    shard_groups as shard_groups,
    shuffled_batches as shuffled_batches,
)
from .shard_file import (
    num_bytes_of as num_bytes_of,
    vector_array as vector_array,
    vectors_of as vectors_of,
)
from .store import (
    EMBEDDINGS as EMBEDDINGS,
    FAILURE_SCHEMA as FAILURE_SCHEMA,
    FAILURES as FAILURES,
    PASSING as PASSING,
    RECIPE_FILE as RECIPE_FILE,
    Store as Store,
    check_place as check_place,
    extra_columns as extra_columns,
    row_schema as row_schema,
    shard_name as shard_name,
)
