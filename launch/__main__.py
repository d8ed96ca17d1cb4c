"""`python -m launch`: the `twinpool` command without an installation."""

from launch.cli import main

main()
