"""`python -m engine_cli` is `engines`: for processes that must run with the same interpreter."""

from engine_cli.main import main

main()
