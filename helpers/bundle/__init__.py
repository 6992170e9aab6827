"""A model as a folder: what it says of itself (`manifest`), and how a task runs it (`runtime`). No torch."""
