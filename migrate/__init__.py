"""The coordinator and the command line: decides about a migration, never touches a page."""
