"""Names of columns, and of the parts of a split, that several packages share.

Names alone: recipes need them, and are read without Arrow.
"""

from collections.abc import Iterable

EMBEDDING = "embedding"  # the vectors, where there is one feature
LOGITS = "logits"  # what a head makes of the vectors, where there is one
VIEW = "view"  # the views' numbers, where there are several
PASSING = "passing"  # of a failure: whether the next run tries again
# Names that the store keeps for itself; a manifest cannot bring columns of these names.
RESERVED_COLUMNS = frozenset(
    (
        *("image_id", "path", "sha256", "bytes", "width", "height", "format", "modified"),
        *(EMBEDDING, "stage", "error", "shard", "same_file"),
    )
)
# What a row is for; those of cross-validation are tested on in one round, and trained on at last.
TRAIN, VALIDATION, TEST, UNUSED = "train", "validation", "test", ""
CROSS_VALIDATED = "cross-validated"


def extra_columns(names: Iterable[str]) -> list[str]:
    """The columns that came from a manifest, among those of refs or of rows."""
    return [name for name in names if name not in RESERVED_COLUMNS]
