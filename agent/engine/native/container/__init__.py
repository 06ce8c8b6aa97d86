"""Scope CONTAINER: what exists once for all tasks. The target's own runtime makes nearly all of it."""
