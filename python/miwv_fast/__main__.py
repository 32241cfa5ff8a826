"""python -m miwv_fast: the command line."""

from miwv_fast.cli import main

main()
