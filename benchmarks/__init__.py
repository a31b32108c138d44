"""Measurements that stand behind the numbers in the documentation; each is a command."""
