"""Servers and fixtures that all suites share. A server starts when the first test asks for it, and dies with the run."""
