"""One module a command; `cli.main` imports a module when its command is asked for."""
