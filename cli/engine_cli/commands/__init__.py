"""One module a command; `main` imports a module when its command is asked for."""
