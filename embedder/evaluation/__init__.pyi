from .evaluation import Evaluation as Evaluation, expand_logits as expand_logits
from .metrics import (
    Scores as Scores,
    accuracy_in_words as accuracy_in_words,
    confusion_matrix as confusion_matrix,
    paired_difference as paired_difference,
)
from .paired_test import SIGNIFICANT as SIGNIFICANT, PairedTest as PairedTest, judge as judge
from .tested_model import (
    TestedModel as TestedModel,
    check_same_images as check_same_images,
    read_tested as read_tested,
)
