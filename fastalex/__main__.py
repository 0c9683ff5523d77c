import sys

if sys.argv[1:2] == ["check"]:  # without what the rest of the command line needs
    from fastalex.check.command import main as check

    raise SystemExit(check(sys.argv[2:]))
from fastalex.cli import main

main()
