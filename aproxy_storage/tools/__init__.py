"""Tools on top of the public API: many files at once, reconcile, verify."""
