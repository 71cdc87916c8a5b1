from .api import extract as extract, train as train
from .errors import EmbedderError as EmbedderError
from .store import Store as Store

__version__: str
