"""What a run will take: measured runs, a cost model, a simulation of Spark's scheduler, and their figures."""
