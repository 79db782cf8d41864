"""Everything that changes while training."""
