"""What models are worth: figures with intervals by object, speed as served, reports."""
