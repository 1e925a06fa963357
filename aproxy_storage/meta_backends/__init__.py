"""Meta-backends: they keep one record per file. One module each; import the one you use."""
