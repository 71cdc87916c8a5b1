from .finetune import Watcher as Watcher, finetune as finetune
from .parameter_groups import TuneOptions as TuneOptions
