"""Open files of small programs: dumped from one process, restored into another, looked at from inside."""
