"""The only code that knows Lightning's private parts: per-namespace classes, the graft, the lazy patches, the CLI."""
