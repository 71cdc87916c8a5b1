from .export import DESCRIPTION_FILE as DESCRIPTION_FILE, export as export
from .options import ExportFormat as ExportFormat
from .predict import predict as predict
