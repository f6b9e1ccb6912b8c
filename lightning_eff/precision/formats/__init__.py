"""Number formats as layers use them, each with its options."""
