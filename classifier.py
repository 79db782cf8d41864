"""The old name of `python -m scoring.train_classifier`, which takes the same arguments."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scoring.train_classifier", run_name="__main__", alter_sys=True)
