from .cross_validation import refit as refit
from .fitting import Fitted as Fitted, HeadSpec as HeadSpec
from .options import (
    ClassWeight as ClassWeight,
    HeadName as HeadName,
    Seed as Seed,
    TrainOptions as TrainOptions,
)
from .self_training import PseudoLabels as PseudoLabels
from .semi_supervised import (
    SemiSupervisedFit as SemiSupervisedFit,
    Unlabelled as Unlabelled,
    check_head as check_head,
    fit_semi_supervised as fit_semi_supervised,
    read_unlabelled as read_unlabelled,
)
from .timing import Stopwatch as Stopwatch
from .train import train as train
from .trained_head import TrainedHead as TrainedHead
