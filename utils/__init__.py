"""Helpers that know little of diffusion: data, files, devices, processes, logs, pictures."""

import os
import sys

# A script started from a notebook inherits the notebook's backend, and matplotlib refuses to be
# imported where that is not installed. Scripts draw into files, without any backend.
if "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)
