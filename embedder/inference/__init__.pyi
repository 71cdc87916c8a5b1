from .export import DESCRIPTION_FILE as DESCRIPTION_FILE, export as export
from .predict import predict as predict
