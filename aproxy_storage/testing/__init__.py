"""What this library holds its own backends to, for others to hold theirs to: conformance suites and faults.

Importing this package imports no pytest; the suites do. Nothing else of the library imports from here.
"""
