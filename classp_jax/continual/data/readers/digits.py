"""The handwritten digits that are embedded in scikit-learn."""

import numpy as np

from classp_jax.continual.data.readers._common import import_package
from classp_jax.continual.data.sources import Source, source_from_arrays


def read_digits() -> Source:
    """1,797 digits, uint8 ``[8, 8, 1]``; 0 to 16 becomes 0 to 255, rounded down.

    Example:
      >>> read_digits().class_names[:3]
      ('0', '1', '2')
    """
    data = import_package("sklearn.datasets", "continual").load_digits()
    images = (data.images * (255 / 16)).astype(np.uint8)
    return source_from_arrays("digits", (images, data.target))
