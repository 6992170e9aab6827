"""What a run or a training tells of itself while it goes on, and afterwards."""
