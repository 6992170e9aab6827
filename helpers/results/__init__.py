"""What a run leaves: its results, its record, its progress and its dashboard."""
