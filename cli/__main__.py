"""`python -P -m cli`: the command line as `--jobs` starts it. Without -P, modules of the current folder come first.

torchrun starts the console script: `torchrun --no-python e2kd distill CONFIG`.
"""

from cli.main import main

main()
