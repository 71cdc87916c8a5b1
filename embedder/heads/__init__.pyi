from .calibration import (
    Calibration as Calibration,
    calibrate as calibrate,
    fit_temperature as fit_temperature,
    probabilities_of as probabilities_of,
)
from .keras_head import (
    Batch as Batch,
    KerasHead as KerasHead,
    classifier_layers as classifier_layers,
)
from .keras_layers import as_keras_layers as as_keras_layers
from .model import Model as Model, logits_of as logits_of, read_logits as read_logits
from .model_folder import (
    BACKBONE_FILES as BACKBONE_FILES,
    PREDICTIONS_FILE as PREDICTIONS_FILE,
    REPORT_FILE as REPORT_FILE,
    ModelFolder as ModelFolder,
    Provenance as Provenance,
    Record as Record,
    RecordedOptions as RecordedOptions,
    RecordedTuning as RecordedTuning,
)
from .ridge_head import (
    NUM_FOLDS as NUM_FOLDS,
    RidgeHead as RidgeHead,
    stratified_folds as stratified_folds,
)
from .ridge_statistics import (
    CHUNK_ROWS as CHUNK_ROWS,
    SufficientStatistics as SufficientStatistics,
    one_vs_rest_targets as one_vs_rest_targets,
    sums_by_fold as sums_by_fold,
)
from .table import (
    HEADS as HEADS,
    Settings as Settings,
    find_head as find_head,
    make_estimator as make_estimator,
)
