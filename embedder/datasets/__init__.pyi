from .labels import codes_of as codes_of, read_labels as read_labels, texts_of as texts_of
from .splits import (
    Folds as Folds,
    Indices as Indices,
    Split as Split,
    grouped_folds as grouped_folds,
    make_split as make_split,
    share_of as share_of,
    strata_of as strata_of,
)
from .training_set import (
    TrainingSet as TrainingSet,
    coarse_classes as coarse_classes,
    read_training_set as read_training_set,
)
