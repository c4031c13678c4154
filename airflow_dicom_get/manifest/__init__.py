"""The manifest: one row per instance of the plan."""
