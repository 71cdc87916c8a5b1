from .evaluate import (
    EvaluationResult as EvaluationResult,
    evaluate_model as evaluate_model,
)
from .export import DESCRIPTION_FILE as DESCRIPTION_FILE, Exported as Exported, export as export
from .options import ExportFormat as ExportFormat
from .predict import Predictions as Predictions, predict as predict
