"""One file a subcommand: its arguments, its help, how its result is shown."""
