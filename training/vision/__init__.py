"""Networks that classify cutouts: training as published, pre-training on galaxies, and studies."""
