"""Original backends: they keep the bytes. One module each; import the one you use."""
