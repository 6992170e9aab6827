"""Training on one process and on Spark, the same function."""
