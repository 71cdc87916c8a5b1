from .doctor import machine as machine, self_test as self_test
from .verify import Check as Check, verify as verify
