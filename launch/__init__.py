"""The `twinpool` command and what starts all roles on one machine."""
