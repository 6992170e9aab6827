"""Stage 1 on the driver: which images there are, how they are split into partitions, and who reads them."""
