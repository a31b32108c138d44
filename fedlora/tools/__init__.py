"""Commands: the command line, the self-test of private training, and its audit."""
