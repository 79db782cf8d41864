"""Everything that is neither a network nor a script."""
