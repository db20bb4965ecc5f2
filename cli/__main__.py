"""`python -P -m cli`: the command line as `--jobs` starts it. Without -P, Python looks for modules in the current folder
first. Under torchrun it is the console script: `torchrun --no-python e2kd distill CONFIG`."""

from cli.main import main

main()
