"""``python -m dynarank``: the command line."""

from dynarank.cli import main

main()
