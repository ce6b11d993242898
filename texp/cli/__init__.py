"""The command line, a file for each command: texp demo | schedule | audit | bench | build | info."""
