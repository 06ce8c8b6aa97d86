"""The phases of a migration, one file each: `enter` does it, `undo` takes it back."""
