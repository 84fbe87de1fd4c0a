"""The entry point of `python -m spectool`, which torchrun uses."""

from spectool.cli import main

if __name__ == "__main__":
    main()
