"""python -m miwv_fast: the command line."""

from miwv_fast.cli import main

if __name__ == "__main__":
    main()
