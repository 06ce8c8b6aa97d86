"""Engines: what takes a running container apart on the source and puts it together on the target."""
