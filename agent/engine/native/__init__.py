"""The engine that dumps and restores by ptrace: one file a kernel resource."""
