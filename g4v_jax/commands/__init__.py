"""One file a group of commands: flags, one call, and what is said of the outcome."""
