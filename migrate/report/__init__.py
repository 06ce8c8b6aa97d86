"""What is said when a migration is over: the object of `--json`, and a summary for people."""
