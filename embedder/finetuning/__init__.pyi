from .finetune import Tuned as Tuned, Watcher as Watcher, finetune as finetune
from .options import TuneOptions as TuneOptions
