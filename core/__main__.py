"""`python -m spectool` does what `spectool` does (torchrun starts it this way)."""

from spectool.cli import main

if __name__ == "__main__":
    main()
