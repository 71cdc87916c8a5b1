"""What tests of the engines share."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support import picture


@pytest.fixture(scope="package")
def pixels() -> NDArray[np.uint8]:
    return np.stack([picture(seed, 64, 96) for seed in range(6)])
