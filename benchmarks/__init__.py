"""Scripts that measure. A package only so that benchmarks.gpu_kit can be run with `python -m`."""
