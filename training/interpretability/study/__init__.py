"""What the features of a run are worth, beside what they are compared with."""
