from .compare import compare as compare, row_of as row_of
