"""What does eviction do to a model and its answers? A tool beside the library.

``ckv_compile.perturbation`` and ``python -m ckv_compile perturb | eval | study`` are its doors;
nothing else of the package imports it.
"""
