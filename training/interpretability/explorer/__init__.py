"""A run as one HTML page: its features, and the alerts that activate them."""
