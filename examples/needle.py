"""Hide a fact in a long text, ask for it with the full cache and with a share of it, compare.

``python -m ckv_compile demo`` runs the same.
"""

from ckv_compile.evidence.demo import main

if __name__ == "__main__":
    main()
