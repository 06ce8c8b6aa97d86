"""Downtime of a live migration, by part, and what a client sees of it: against memory, dirty rate and link."""
