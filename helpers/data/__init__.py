"""Data sets made or fetched here: Fashion-MNIST, its scenes, and photographs to measure with."""
