"""Scope OPEN FILE: what a process holds open, one file a kind, dump and restore side by side.

`registry.KINDS` lists them; `check`, `PreparedDump`, `restore` and `activate` are all that the engine calls.
"""
