from .comparison_report import write_comparison as write_comparison
from .model_report import notes_of as notes_of, write_head_report as write_head_report
