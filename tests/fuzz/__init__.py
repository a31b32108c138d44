"""What comes from outside, damaged at random: `python -m tests.fuzz --help`. The quick tests call the same functions."""
