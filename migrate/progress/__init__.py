"""Observers that show a migration while it runs. They only look; all they write goes to standard error or a log."""
