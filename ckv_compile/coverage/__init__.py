"""Does every architecture of the installed transformers work, or say why not? A tool, no library.

Nothing else of the package imports it; ``python -m ckv_compile coverage`` runs it.
"""
