"""Labels made by people: which alerts to label next, and classifiers that learn from some hundred labels."""
