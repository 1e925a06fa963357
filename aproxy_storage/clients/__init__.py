"""What the original backend and the meta-backend of one service share: its clients, one per event loop, and its errors.

Imported by those backends alone; a module here imports its driver, as they do.
"""
