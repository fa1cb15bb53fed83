"""`python -m gradscale` is the `gradscale` command."""

from gradscale.cli import main

main()
