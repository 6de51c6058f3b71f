"""`python -m cli` is `engines`: for processes that must run with the same interpreter."""

from cli.main import main

main()
