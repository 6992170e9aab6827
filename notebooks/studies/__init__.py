"""Tools that notebooks, benchmarks and tests need beside the package: figures, comparisons of formats, clusters."""
