"""What a run leaves: its results, pictures of a sample, its record, its progress and its dashboard."""
