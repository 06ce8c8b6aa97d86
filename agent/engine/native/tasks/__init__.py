"""Scope TASK: what belongs to a process or thread, one file a resource, dump and restore side by side.

`agent.engine.native.registry` lists them in restore order.
"""
