"""Finding the pages that a running process has written."""
