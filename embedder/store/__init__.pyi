from .failure import Failure as Failure
from .lease import lease as lease, rewriting as rewriting
from .parts import (
    Part as Part,
    last_division as last_division,
    part_numbers as part_numbers,
    share_of as share_of,
)
from .scanning import (
    scan as scan,
    shard_groups as shard_groups,
    shuffled_batches as shuffled_batches,
)
from .schema import (
    EMBEDDINGS as EMBEDDINGS,
    FAILURES as FAILURES,
    Row as Row,
    failures_table as failures_table,
    own_fields as own_fields,
    row_indices as row_indices,
    rows_table as rows_table,
    shard_name as shard_name,
)
from .shard_file import vectors_of as vectors_of
from .store import (
    Store as Store,
    check_place as check_place,
)
