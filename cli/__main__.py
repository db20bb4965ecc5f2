"""`python -m cli`, which is how torchrun starts the command line: `torchrun -m cli distill CONFIG`."""

from cli.main import main

main()
