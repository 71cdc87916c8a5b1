from .evaluation import Evaluation as Evaluation, expand_logits as expand_logits
from .metrics import (
    Scores as Scores,
    accuracy_in_words as accuracy_in_words,
    paired_difference as paired_difference,
)
from .paired_test import SIGNIFICANCE_LEVEL as SIGNIFICANCE_LEVEL, PairedTest as PairedTest
from .tested_model import TestedModel as TestedModel
