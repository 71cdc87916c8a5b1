from .check import Check as Check
from .doctor import (
    Examination as Examination,
    machine as machine,
    self_test as self_test,
)
from .verify import verify as verify
