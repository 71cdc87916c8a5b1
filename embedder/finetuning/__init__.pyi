from .finetune import Watcher as Watcher, finetune as finetune
from .options import TuneOptions as TuneOptions
