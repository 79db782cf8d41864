"""The old name of `python -m benchmarks`, which takes the same arguments."""

import runpy

if __name__ == "__main__":
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
