from .evaluation import Evaluation as Evaluation, widened as widened
from .metrics import (
    Scores as Scores,
    confusion_matrix as confusion_matrix,
    paired_difference as paired_difference,
)
from .paired_test import SIGNIFICANT as SIGNIFICANT, Against as Against, judge as judge
from .tested_model import (
    Tested as Tested,
    check_same_images as check_same_images,
    read_tested as read_tested,
)
