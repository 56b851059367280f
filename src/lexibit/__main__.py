"""``python -m lexibit``."""

from lexibit.cli import main

main()
