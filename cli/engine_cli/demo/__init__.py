"""What `engines demo` starts and compares: see `engine_cli.commands.demo`."""
