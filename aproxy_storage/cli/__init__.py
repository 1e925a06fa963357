"""The command line: one module per group of commands; `app` lists them. Needs the extra ``cli``."""
