"""`python -m peft.cli` is `peft`."""

from peft.cli import main

main()
