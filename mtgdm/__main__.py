"""`python -m mtgdm`."""

from mtgdm.cli import main

main()
