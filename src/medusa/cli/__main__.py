"""`python -m medusa.cli`, for machines where the command `medusa` is not on the path."""

from medusa.cli import main

main()
