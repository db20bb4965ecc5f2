"""matplotlib as this package uses it: without a display, and by its own defaults.

A `matplotlibrc` of the folder in which a command is started is not obeyed: it could have pictures typeset by LaTeX.
"""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt

__all__ = ["plt"]

matplotlib.rcdefaults()
matplotlib.use("Agg")
