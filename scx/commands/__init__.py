"""What `scx` does on the command line: each file is one command, above the library."""
